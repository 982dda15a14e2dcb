"""Gold passages that the index lacks are found out before the first step."""

from pathlib import Path

import helpers_trainers as helpers
import pytest
from helpers_retriever import Lengths, running

from convsearch import distill, grpo
from convsearch.retriever.client import RetrieverClient
from convsearch.runs import checkpoint, rollouts
from retriever_server.serving.app import create_app

GOLDS = list(helpers.GOLDS)


def test_a_missing_gold_is_named_before_the_first_step(form_llama: Path, toy_server: str, tmp_path: Path) -> None:
    rows = helpers.grpo_rows(GOLDS)
    for number in (3, 11):
        rows[number]["reward_model"]["ground_truth"] = ["rome-food", f"atlantis-{number}"]
    data = helpers.write_parquet(tmp_path / "train.parquet", rows)
    arguments = helpers.grpo_overrides(form_llama, data, tmp_path / "run", toy_server, total_training_steps=1)
    for skip in ("0", "1"):
        error = helpers.one_sentence(*helpers.call(grpo.main, [*arguments, f"data.skip_bad={skip}"]))
        assert f"2 of 18 queries of {data} have a gold passage that the index bm25-" in error
        assert "for example q3 (atlantis-3), q11 (atlantis-11)" in error
        assert "use the index of their collection, or leave them out with data.skip_bad=2" in error
    assert checkpoint.checkpoints(tmp_path / "run") == []
    status, output = helpers.call(grpo.main, [*arguments, "data.skip_bad=2", "data.train_batch_size=16"])
    assert status == 0, output
    assert "2 of 18 queries are left out, because the index lacks their gold passage" in output
    drawn = {rollout.example.qid for rollout in rollouts.load(tmp_path / "run", 0)}
    assert drawn == {f"q{number}" for number in range(18)} - {"q3", "q11"}


def test_an_index_of_another_collection_is_refused(form_llama: Path, toy_server: str, tmp_path: Path) -> None:
    rows = helpers.grpo_rows(GOLDS)
    for number, row in enumerate(rows):
        row["reward_model"]["ground_truth"] = [f"other-{number:02}"]
    data = helpers.write_parquet(tmp_path / "train.parquet", rows)
    arguments = helpers.grpo_overrides(form_llama, data, tmp_path / "run", toy_server, data__skip_bad=1000)
    error = helpers.one_sentence(*helpers.call(grpo.main, arguments))
    assert "has none of the 18 gold passages of" in error
    assert "for example 'other-00': use the index of their collection" in error


def test_distillation_checks_them_too(form_llama: Path, toy_server: str, tmp_path: Path) -> None:
    rows = helpers.conversation_rows(GOLDS)
    rows[4]["gold_docids"] = ["atlantis"]
    data = helpers.write_jsonl(tmp_path / "train.json", rows)
    command = ["--model_name_or_path", form_llama, "--input_path", data, "--output_dir", tmp_path / "out", "--k", 0]
    command += ["--names", "--rank_limit", 20, "--retriever_url", toy_server]
    error = helpers.one_sentence(*helpers.call(distill.main, command))
    assert f"1 of 18 queries of {data} have a gold passage that the index" in error
    assert "--skip_bad=1" in error
    assert helpers.call(distill.main, [*command, "--skip_bad=1"])[0] == 0
    assert len(helpers.read_jsonl(tmp_path / "out" / "samples.jsonl")) == 17


def test_the_client_names_its_index_and_what_that_lacks() -> None:
    app = create_app({"one": Lengths("one", "ab"), "two": Lengths("two", "bc")})
    with running(app) as http:
        for index, index_id, missing in (
            (None, "one-1", ["c", "d"]),
            ("two", "two-1", ["a", "d"]),
            ("one+two", "one-1+two-1", ["d"]),
        ):
            with RetrieverClient(str(http.base_url), index=index) as client:
                assert client.index_id() == index_id
                assert client.missing(["a", "b", "c", "d"]) == missing
        with (
            RetrieverClient(str(http.base_url), index="one+three") as client,
            pytest.raises(ValueError, match="no index 'three'"),
        ):
            client.index_id()
