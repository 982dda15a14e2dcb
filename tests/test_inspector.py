"""The inspector: what it reads of a run, page by page, while the run goes on; and the page itself in a browser."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_pages import FAINT, ROOT, SCRIPT, Reader, add_step, browser_page, rollout, write_run

from convsearch.inspector import store
from convsearch.inspector.app import FILES, create_app
from convsearch.inspector.store import Filter, Run, compare, phrases
from convsearch.rewards.scoring import Group
from convsearch.runs.rollouts import SCHEMA, dump, load


@contextmanager
def serving(*folders: Path, limit_s: float = 60) -> Iterator[tuple[httpx.Client, int]]:
    """A real inspector of these runs on a free port, and its process id."""
    command = [sys.executable, "-m", "convsearch.inspect", *map(str, folders), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.fullmatch(r"inspector: (http://127\.0\.0\.1:\d+)/\n", process.stdout.readline())
        assert found is not None
        with httpx.Client(base_url=found[1], timeout=limit_s, trust_env=False) as client:
            yield client, process.pid
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("inspector") / "demo", steps=4)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Any]:
    from starlette.testclient import TestClient

    with TestClient(
        create_app([Run(folder), Run(folder)]), base_url="http://127.0.0.1", raise_server_exceptions=False
    ) as client:
        yield client


def keys(page: dict[str, Any]) -> list[tuple[int, int]]:
    return [(found["step"], found["row"]) for found in page["rollouts"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('tall "the tower', ["tall", "the tower"]),
        ('"a b"c', ["a b", "c"]),
        ('""', []),
        ("  ", []),
        ('a" b "', ["a", " b "]),
    ],
)
def test_phrases(text: str, expected: list[str]) -> None:
    assert phrases(text) == expected


def test_metrics_are_read_from_where_the_page_is(tmp_path: Path) -> None:
    path, run = tmp_path / "metrics.jsonl", Run(tmp_path)
    assert run.metrics() == {"version": "", "offset": 0, "reset": False, "records": []}
    path.write_text('{"step": 0, "reward": NaN}\n{"step": 1, "rew')
    first = run.metrics()
    assert (first["offset"], first["reset"], first["records"]) == (27, True, [{"step": 0, "reward": None}])
    with path.open("a") as file:
        file.write('ard": 2}\n')
    second = run.metrics(first["version"], first["offset"])
    assert (second["reset"], second["records"]) == (False, [{"step": 1, "reward": 2}])
    assert second["offset"] == path.stat().st_size
    assert run.metrics(second["version"], second["offset"])["records"] == []
    other = tmp_path / "new"  # a run that resumes writes the file anew
    other.write_text(
        '{"step": 0, "reward": 5}\n{"step": 9, "reward": 9, "more": "than before, so that the size does not tell"}\n'
    )
    other.replace(path)
    assert [record["step"] for record in run.metrics(second["version"], second["offset"])["records"]] == [0, 9]
    assert run.metrics(second["version"], 10**6)["reset"]


def test_state_is_answered_once(client: Any) -> None:
    first = client.get("/api/state")
    assert first.json()["steps"] == [0, 1, 2, 3]
    assert first.json()["rollouts"] == 16
    assert len(first.json()["metrics"]["records"]) == 4
    assert client.get("/api/state", headers={"if-none-match": first.headers["etag"]}).status_code == 304


def test_a_new_step_changes_the_tag_and_is_found(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run", steps=1))
    before = run.etag()
    add_step(run.folder, 1)
    assert run.etag() != before
    assert [step.number for step in run.steps()] == [0, 1]
    dump(run.folder, 1, [Group((rollout("z_1", "written anew", 1, 2.0),))])
    assert [step.rows for step in run.steps()] == [4, 1]


def test_groups_stand_side_by_side(client: Any) -> None:
    page = client.get("/api/groups", params={"step": 2}).json()
    assert [(group["qid"], len(group["samples"])) for group in page["groups"]] == [("a_1", 2), ("b_1", 2)]
    assert page["groups"][0]["reward"] == pytest.approx(1.35)
    sample = page["groups"][0]["samples"][0]
    assert (sample["rewrite"], sample["thinking"], sample["rank"], sample["row"]) == (
        "tall towers 2",
        "about a_1",
        1,
        0,
    )
    second = client.get("/api/groups", params={"step": 2, "start": 1, "count": 1}).json()
    assert [group["samples"][0]["row"] for group in second["groups"]] == [2]


FILTERS: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [0, 1, 2, 3]),
    ({"text": "TALL"}, [0]),
    ({"text": "about tall"}, [0]),
    ({"text": '"tall about"'}, []),
    ({"text": "<script>"}, [2]),
    ({"qid": "b_"}, [2, 3]),
    ({"error": "any"}, [3]),
    ({"error": "none"}, [0, 1, 2]),
    ({"error": "empty"}, []),
    ({"rank": "1"}, [0]),
    ({"rank": "11-100"}, [1]),
    ({"rank": "none"}, [2, 3]),
    ({"reward_min": 0.5, "reward_max": 1}, [1]),
]


@pytest.mark.parametrize(("wanted", "rows"), FILTERS)
def test_filters(client: Any, wanted: dict[str, Any], rows: list[int]) -> None:
    """The newest steps first, and within a step as sampled."""
    page = client.get("/api/rollouts", params=wanted | {"size": 200}).json()
    assert keys(page) == [(step, row) for step in (3, 2, 1, 0) for row in rows]
    assert page["cursor"] is None


@pytest.mark.parametrize(
    "wanted",
    [Filter(), Filter(rank="none"), Filter(text="towers"), Filter(step_min=1, step_max=2), Filter(qid="nobody")],
)
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("scan", [1, 6, 100])
def test_pages_together_are_the_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wanted: Filter, size: int, scan: int
) -> None:
    run = Run(folder)
    whole = keys(run.find(wanted, size=200))
    monkeypatch.setattr(store, "SCAN_ROWS", scan)
    seen, cursor = [], ""
    for _ in range(40):
        page = run.find(wanted, cursor, size)
        assert len(page["rollouts"]) <= size
        seen += keys(page)
        if page["cursor"] is None:
            break
        cursor = page["cursor"]
    assert seen == whole


def test_one_rollout_with_its_tokens(client: Any, folder: Path) -> None:
    found = client.get("/api/rollout", params={"step": 1, "row": 3}).json()
    original = load(folder / "grpo", 1)[3]
    assert (found["qid"], found["error"], found["reward"]) == (original.example.qid, "no_tag", -0.1)
    assert found["tokens"] == [["#8", -0.5], ["#9", -1.5]]
    assert (found["prompt"], found["prompt_tokens"], found["group"]) == (None, 3, [2, 3])


def test_tokens_are_text_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    folder = write_run(tmp_path / "run", steps=1)
    (folder / "grpo" / "model").mkdir()
    words = {word: 5 + i for i, word in enumerate(["who", "wrote", "it", "he", "did"])}
    Tokenizer(models.WordLevel(words | {"?": 0}, unk_token="?")).save(str(folder / "grpo" / "model" / "tokenizer.json"))
    found = Run(folder).rollout(0, 0)
    assert (found["prompt"], found["prompt_tokens"]) == ("who wrote it", 3)
    assert found["tokens"] == [["he", -0.5], ["did", -1.5]]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/api/rollout?step=77&row=0", 404, "has no rollouts of step 77"),
        ("/api/rollout?step=1&row=4", 404, "has 4 rollouts, there is no row 4"),
        ("/api/groups?step=1&run=2", 404, "there is no run 2"),
        ("/api/groups?step=1&run=-1", 404, "there is no run -1"),
        ("/api/rollouts?rank=third", 422, "rank 'third' is not one of"),
        ("/api/rollouts?cursor=../x", 422, "is not STEP:ROW"),
        ("/..%2f..%2fpyproject.toml", 404, ""),
        ("/store.py", 404, ""),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(client: Any, path: str, status: int, words: str) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert words in answer.json()["detail"]


def test_two_runs(tmp_path: Path) -> None:
    one, other = Run(write_run(tmp_path / "one", steps=2)), Run(write_run(tmp_path / "other", steps=1))
    dump(
        other.folder,
        0,
        [
            Group(
                (
                    rollout("a_1", "better", 1, 2.0),
                    rollout("c_1", "new", 1, 2.0),
                )
            )
        ],
    )
    found = compare(one, other)
    assert found["shared"] == 1
    assert found["queries"] == [{"qid": "a_1", "rollouts": [4, 1], "reward": [pytest.approx(1.35), 2.0]}]
    assert {"name": "reward", "values": [pytest.approx(1.05), 1.0]} in found["metrics"]


def test_the_page_is_served_with_a_strict_policy_to_this_machine_alone(client: Any) -> None:
    answer = client.get("/")
    page = Reader(answer.text)
    assert "main" in dict(page.elements)
    links = [attributes[key] for _, attributes in page.elements for key in ("href", "src") if key in attributes]
    assert all(link and (link.startswith(("#", "data:")) or f"/{link}" in FILES) for link in links)
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on") or key == "style"]
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert all(client.get(address).status_code == 200 for address in FILES)
    assert client.get("/api/runs", headers={"host": "evil.example"}).status_code == 400
    scripts = [(path.read_text(), path.name) for path in FILES.values() if path.suffix == ".js"]
    assert [
        name
        for text, name in scripts
        if re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    ] == []


@pytest.mark.parametrize("name", ["rollouts/000001.parquet", "metrics.jsonl"])
def test_damaged_files_are_a_sentence(name: str, tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    run = Run(write_run(tmp_path / "run", steps=2))
    path = run.folder / name
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"?" * (len(content) - 4) + content[-2:] + b"\n")
    with TestClient(create_app([run]), base_url="http://localhost", raise_server_exceptions=False) as page:
        answer = page.get("/api/state")
    assert answer.status_code == 422
    assert str(path) in answer.json()["detail"]


def test_command_line_refuses_what_it_cannot_serve(tmp_path: Path) -> None:
    for arguments, words in ((["a", "b", "c"], "two at most"), ([str(tmp_path / "none")], "there is no run folder")):
        done = subprocess.run(
            [sys.executable, "-m", "convsearch.inspect", *arguments], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def big_run(folder: Path, steps: int, rows: int) -> Path:
    """Rollouts of a realistic size; one word is in each step once, and one word is in a single rollout."""
    (folder / "rollouts").mkdir(parents=True)
    vocabulary = "who what when where tower bridge castle river king queen music city history science"
    words = np.array(vocabulary.split())
    rng = np.random.default_rng(0)
    picks = words[rng.integers(len(words), size=(rows, 40))]
    texts = [f"<think>{' '.join(row[:25])}</think>\n<rewrite>{' '.join(row[25:])}</rewrite>" for row in picks]
    ids = pa.array([list(range(120))] * rows, pa.list_(pa.int32()))
    for step in range(steps):
        texts[7] = f"<think>rare{step:04d}</think>\n<rewrite>{'unicorn' if step == 0 else 'horse'} {step}</rewrite>"
        steps_ = pa.array(np.full(rows, step, np.int32))
        columns = {
            "step": steps_, "qid": [f"train_{step}_{row // 8}" for row in range(rows)], "prompt_ids": ids,
            "token_ids": ids, "logprobs": ids.cast(pa.list_(pa.float32())), "text": texts,
            "finish_reason": ["stop"] * rows, "weights_version": steps_, "rewrite": [text[8:80] for text in texts],
            "error": [None] * rows, "rank": pa.array(rng.integers(1, 101, rows).astype(np.int32)),
            "reward": rng.random(rows), "advantage": rng.random(rows), "gain": pa.nulls(rows, pa.float64()),
            "trained": [True] * rows,
        }  # fmt: skip
        pq.write_table(
            pa.table(columns, schema=SCHEMA), folder / "rollouts" / f"{step:06d}.parquet", compression="zstd"
        )
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps({"step": step, "reward": step / steps}) + "\n" for step in range(steps))
    return folder


def most_memory_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


@pytest.mark.slow
def test_a_million_rollouts(tmp_path: Path) -> None:
    """500 steps of 2,000: every question is answered by pages, and the server never holds the text of all (0.3 GB) at
    once."""
    folder = big_run(tmp_path / "big", 500, 2000)
    with serving(folder) as (client, pid):
        assert client.get("/api/state").json()["rollouts"] == 1_000_000
        first = client.get("/api/rollouts", params={"size": 25}).json()
        assert [found["step"] for found in first["rollouts"]] == [499] * 25
        ranked = client.get("/api/rollouts", params={"rank": "1", "text": "tower", "step_max": 100}).json()
        assert len(ranked["rollouts"]) == 25
        assert {found["rank"] for found in ranked["rollouts"]} == {1}
        found, cursor, asked = [], "", 0
        while cursor is not None:  # one in a million, in the oldest step
            page = client.get("/api/rollouts", params={"text": "unicorn", "cursor": cursor}).json()
            assert page["scanned"] <= store.SCAN_ROWS + 2000
            found, cursor, asked = found + keys(page), page["cursor"], asked + 1
        assert (found, asked) == ([(0, 7)], 4)
        assert client.get("/api/groups", params={"step": 250, "count": 10}).json()["total"] == 250
        assert client.get("/api/rollout", params={"step": 250, "row": 1999}).json()["prompt_tokens"] == 120
        assert most_memory_mib(pid) < 500


@pytest.mark.slow
def test_in_a_browser_a_run_is_followed_and_searched(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=30)
    with serving(folder) as (client, _), browser_page() as page:
        page.goto(f"{client.base_url}/")
        page.wait_for_selector("text=newest step 30, 120 rollouts")
        assert page.locator("figure svg").count() == 6
        page.get_by_role("link", name="Groups").click()
        page.wait_for_selector("text=tall towers 29")
        threading.Timer(0.5, add_step, (folder / "grpo", 30)).start()
        page.wait_for_selector("text=tall towers 30")  # it follows the run
        page.keyboard.press("j")
        page.wait_for_selector("text=tall towers 29")
        assert page.locator("text=" + SCRIPT).count() == 1  # as text
        page.keyboard.press("/")
        page.wait_for_selector("#text:focus")
        page.keyboard.type("towers")
        page.keyboard.press("Enter")
        page.locator("article:has-text('towers')").nth(23).wait_for()
        page.wait_for_selector("text=24 rollouts, newest steps first")
        page.locator("#next").click()
        page.wait_for_selector("text=7 rollouts, newest steps first")
        page.get_by_label("Gold rank").select_option("11-100")
        page.get_by_label("Words in the output").fill("")
        page.get_by_role("button", name="Search").click()
        page.wait_for_selector("text=many cats")
        page.locator("article a").first.click()
        page.wait_for_selector("text=Samples of its group")
        link = page.url
        page.goto("about:blank")
        page.goto(link)  # its address leads back to it
        page.wait_for_selector("h2:has-text('many cats')")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_every_view_fits_and_is_readable(tmp_path: Path, width: int, scheme: str) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", steps=5)
    with serving(one, other) as (client, _), browser_page(width, scheme) as page:
        for view, words in (
            ("curves", "dots: held-out"),
            ("groups", "many cats"),
            ("search?qid=b_1", "looked through"),
            ("rollout?step=1&row=3", "no_tag"),
            ("compare", "Queries that differ most"),
        ):
            page.goto("about:blank")
            page.goto(f"{client.base_url}/#{view}")
            page.wait_for_selector(f"text={words}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(FAINT) == []
