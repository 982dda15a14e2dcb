"""Our rewards in other people's trainers, against the real libraries and a real retrieval server.

1. TRL's GRPOTrainer trains a tiny model for a step with ``RetrievalReward``, on rows of our own parquet file.
2. verl's loader and its reward managers take ``compute_score`` and ``compute_scores`` from the file, and pay what we
   pay.
3. Both pay what ``convsearch.grpo`` would; what is missing is one sentence.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convsearch.interop import RetrievalReward, compute_score, compute_scores
from convsearch.parsing import parse_rewrite
from convsearch.retriever.client import RetrieverClient, RetrieverError
from convsearch.rewards.shapes import rank_incentive

ROOT = Path(__file__).resolve().parents[1]
ORACLES = Path(os.environ.get("CONVSEARCH_ORACLES", Path(sys.prefix) / "oracles"))
needs_oracles = pytest.mark.skipif(
    not all((ORACLES / name).is_dir() for name in ("verl", "trl")),
    reason="verl and TRL are not installed: bash scripts/test.sh fast",
)
GOOD, NEAR, BAD = (
    "<think>a</think>\n<rewrite>rome food</rewrite>",
    "<think>a</think>\n<rewrite>rome</rewrite>",
    "rome food",
)


def ask(library: str, given: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tests" / "helpers_interop.py"), library, json.dumps(given)]
    environment = {**os.environ, "PYTHONPATH": f"{ORACLES}:{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def expected(url: str, texts: list[str], golds: list[list[str]]) -> list[float]:
    rewrites = [parse_rewrite(text).text for text in texts]
    with RetrieverClient(url) as client:
        ranks = client.gold_ranks(golds, rewrites)
    return [-0.1 if rewrite is None else rank_incentive(rank) for rewrite, rank in zip(rewrites, ranks, strict=True)]


def test_rewards_of_rows_and_of_columns(toy_server: str) -> None:
    reward = RetrievalReward(toy_server)
    chats = [[{"role": "assistant", "content": text}] for text in (GOOD, NEAR, BAD)]
    rows = {"reward_model": [{"ground_truth": ["rome-food"]}] * 3, "extra_info": [{"question": "its food?"}] * 3}
    paid = reward([""] * 3, chats, **rows)
    assert paid == expected(toy_server, [GOOD, NEAR, BAD], [["rome-food"]] * 3)
    assert paid[0] == 2.0 > paid[1] > 0 > paid[2] == -0.1
    assert reward([""] * 3, [GOOD, NEAR, BAD], gold_docids=["rome-food"] * 3, question=["its food?"] * 3) == paid
    assert RetrievalReward(toy_server, name="mrr", format_penalty=-1.0)(
        [""] * 2, [GOOD, BAD], gold_docids=["rome-food"] * 2
    ) == [1.0, -1.0]
    assert reward.__name__ == "retrieval_rank_incentive"


def test_verl_s_function_by_itself(toy_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRIEVER_URL", toy_server)
    found = compute_score("toy", GOOD, ["rome-food"], {"question": "its food?"}, num_turns=1)
    assert found == {"score": 2.0, "rank": 1, "reciprocal_rank": 1.0, "well_formed": 1.0}
    assert compute_score("toy", BAD, "rome-food") == {
        "score": -0.1,
        "rank": 0,
        "reciprocal_rank": 0.0,
        "well_formed": 0.0,
    }
    many = compute_scores(["toy"] * 2, [GOOD, NEAR], [["rome-food"]] * 2, [{}, {}], name="mrr")
    assert many[0]["score"] == 1.0
    assert many[1]["score"] == 1 / many[1]["rank"]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETRIEVER_URL", raising=False)
    with pytest.raises(
        ValueError, match=r"^no retrieval server is named: give url=http://HOST:PORT or set RETRIEVER_URL$"
    ):
        RetrievalReward()
    with pytest.raises(ValueError, match="neither a column 'gold_docids' nor 'reward_model'; it has answer"):
        RetrievalReward("http://127.0.0.1:9")([""], [GOOD], answer=["a"])
    dead = RetrievalReward("http://127.0.0.1:9")
    dead.client.max_wait_s = 0.2
    with pytest.raises(RetrieverError):  # not a reward of zero
        dead([""], [GOOD], gold_docids=["d"])


@pytest.mark.slow
@needs_oracles
def test_trl_trains_with_our_reward(form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path) -> None:
    answer = ask(
        "trl", {"url": toy_server, "folder": str(tmp_path), "parquet": str(toy_parquet), "model": str(form_llama)}
    )
    seen = answer["seen"]
    assert len(seen) == 8
    assert [one["reward"] for one in seen] == expected(
        toy_server, [one["text"] for one in seen], [one["golds"] for one in seen]
    )
    mean = sum(one["reward"] for one in seen) / 8
    assert answer["logged"]["rewards/retrieval_rank_incentive/mean"] == pytest.approx(mean, abs=1e-5)
    assert len({one["reward"] for one in seen}) > 1
    assert answer["moved"] > 1e-4  # it learned from them


@pytest.mark.slow
@needs_oracles
def test_verl_loads_and_pays_the_same(form_llama: Path, toy_server: str) -> None:
    texts, golds = [GOOD, NEAR, BAD], [["rome-food"]] * 3
    path = str(ROOT / "convsearch" / "interop.py")
    answer = ask(
        "verl", {"path": path, "kwargs": {"url": toy_server}, "texts": texts, "golds": golds, "model": str(form_llama)}
    )
    for name in ("compute_score", "compute_scores"):
        assert answer[name]["rewards"] == pytest.approx(expected(toy_server, texts, golds), abs=1e-6)
        assert all(answer[name]["on_last"])
        assert answer[name]["extra"]["well_formed"] == [1, 1, 0]
        assert answer[name]["extra"]["rank"][0] == 1
