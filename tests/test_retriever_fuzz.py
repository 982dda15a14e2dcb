"""Requests of every shape: no body makes the server fail, and each answer is of the form that /openapi.json gives
it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_retriever import Lengths, running
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_server.serving.app import create_app
from retriever_server.serving.schemas import RankResponse, Refusal, RetrieveResponse, SearchResponse

pytestmark = pytest.mark.slow
FUZZ = Path(__file__).resolve().parents[1] / ".venv" / "fuzz"

NAMES = st.sampled_from(["", "a", "b", "q1", "zz", "main", "other", "main+other", "\x00", "\ud800", "refuse", "東京"])
ODD = (
    st.none()
    | st.booleans()
    | st.integers(-2, 10**20)
    | st.floats()
    | NAMES
    | st.lists(NAMES, max_size=2)
    | st.dictionaries(NAMES, NAMES, max_size=1)
)


def mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(*[good] * 9, ODD)


COUNTS = mostly(st.integers(1, 300))
CHOICE = {"index": mostly(NAMES), "indexes": mostly(st.none()) | st.lists(NAMES, max_size=3), "rrf_k": COUNTS}
ITEMS = st.fixed_dictionaries(
    {"id": mostly(st.text(max_size=3)), "query": mostly(NAMES)},
    optional={"qid": NAMES, "gold_docids": st.lists(NAMES, max_size=3)},
)
BODIES = {
    "/rank": (
        RankResponse,
        st.fixed_dictionaries({"items": mostly(st.lists(ITEMS, max_size=4))}, optional=CHOICE | {"depth": COUNTS}),
    ),
    "/search": (
        SearchResponse,
        st.fixed_dictionaries(
            {"queries": mostly(st.lists(NAMES, max_size=4)), "k": COUNTS},
            optional=CHOICE | {"contents": mostly(st.booleans())},
        ),
    ),
    "/retrieve": (
        RetrieveResponse,
        st.integers(0, 3).flatmap(
            lambda size: st.fixed_dictionaries(
                {name: mostly(st.lists(NAMES, min_size=size, max_size=size)) for name in ("queries", "query_ids")},
                optional={"topk": COUNTS, "return_scores": mostly(st.booleans()), "max_length": COUNTS},
            )
        ),
    ),
}


@pytest.fixture(scope="module")
def odd_server() -> Iterator[httpx.Client]:
    with running(
        create_app({"main": Lengths("bm25"), "other": Lengths("ance", "az")}, {"q1": ["a"], "zz": ["gone"]})
    ) as client:
        yield client


@pytest.mark.parametrize("path", list(BODIES))
def test_any_body_gets_an_answer_of_the_documented_form(odd_server: httpx.Client, path: str) -> None:
    model, bodies = BODIES[path]
    seen: set[int] = set()

    @settings(max_examples=300)
    @given(bodies | ODD)
    def check(content: Any) -> None:
        answer = odd_server.post(
            path, content=json.dumps(content).encode(), headers={"content-type": "application/json"}
        )
        seen.add(answer.status_code)
        assert answer.status_code in (200, 404, 422)
        (model if answer.status_code == 200 else Refusal).model_validate_json(answer.content)

    check()
    elsewhere = {"/rank": {"items": [], "index": "x"}, "/search": {"queries": [], "k": 1, "index": "x"}}
    if path in elsewhere:
        seen.add(odd_server.post(path, json=elsewhere[path]).status_code)
    assert seen == ({200, 422} if path == "/retrieve" else {200, 404, 422})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--exclude-path", "/retrieve"],
        [
            "--include-path",
            "/retrieve",
            "--exclude-checks",
            "negative_data_rejection",
        ],  # it takes "100" for 100, as the reference does
    ],
)
@pytest.mark.skipif(not FUZZ.is_dir(), reason=f"schemathesis is not in {FUZZ}: bash scripts/test.sh fast")
def test_schemathesis_finds_no_fault(tmp_path: Any, arguments: list[str]) -> None:
    # 422 stands beside 2xx: no JSON schema says that ids differ, that two lists are equally long, or that of two fields
    # one is given
    (tmp_path / "schemathesis.toml").write_text(
        '[checks]\npositive_data_acceptance.expected-statuses = ["2xx", 404, 422]\n'
    )
    with running(
        create_app({"main": Lengths("bm25"), "other": Lengths("ance", "az")}, {"q1": ["a"], "zz": ["gone"]})
    ) as client:
        command = [
            sys.executable,
            "-c",
            "from schemathesis.cli import schemathesis; schemathesis()",
            "run",
            f"{client.base_url}/openapi.json",
        ]
        done = subprocess.run(
            [*command, "--max-examples", "100", "--no-color", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(FUZZ)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout
    assert re.search(r"(\d+) generated, \1 passed", done.stdout), done.stdout
