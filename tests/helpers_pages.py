"""What the tests of the pages share: a small run folder, a headless browser, and the contrast of colours."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from convsearch.rewards.scoring import Group, Rollout, Score
from convsearch.rewards.shapes import Feedback
from convsearch.runs.rollouts import dump
from convsearch.types import Completion, Example, Rewrite

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "<script>alert('x')</script> & <b>"
# qid -> (question, history, gold, rank of the raw question, rank of the rewrite); None: not found
QUESTIONS: dict[str, tuple[str, list[str], str, int | None, int | None]] = {
    "t_1_1": ("who wrote Hamlet?", [], "d1", 1, 1),
    "t_1_2": ("and his wife?", ["who wrote Hamlet?", "William Shakespeare"], "d2", None, 1),
    "t_1_3": (SCRIPT, ["who wrote Hamlet?", "William Shakespeare", "and his wife?", "Anne Hathaway"], "d3", 4, 2),
    "t_2_1": ("what is a fjord?", [], "d4", 1, None),
}


def rollout(qid: str, text: str, rank: int | None, reward: float, error: Any = None) -> Rollout:
    rewrite = Rewrite(None, error) if error else Rewrite(text, None)
    output = text if error else f"<think>about {qid}</think>\n<rewrite>{text}</rewrite>"
    example = Example(qid, (), "", (), prompt_ids=(5, 6, 7))
    score = Score(rewrite, Feedback(rank), reward)
    return Rollout(example, Completion((8, 9), (-0.5, -1.5), output, "stop"), score, reward - 1)


def write_run(folder: Path, steps: int = 3) -> Path:
    """A run folder of scripts/quickstart.sh: two runs of four questions, ``steps`` steps of two groups of two samples."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"qid": qid, "turn_id": int(qid[-1]), "question": question, "context": context, "gold_docids": [gold]}
        for qid, (question, context, gold, _, _) in QUESTIONS.items()
    ]
    write_lines(folder / "test.json", records)
    rewrites = [
        {**r, "rewrite": f"rewrite of {r['question']}", "reasoning_content": f"thinking {SCRIPT}", "fallback": False}
        for r in records
    ]
    write_lines(folder / "grpo.jsonl", rewrites)
    (folder / "test.trec").write_text("".join(f"{qid} 0 {gold} 1\n" for qid, (_, _, gold, _, _) in QUESTIONS.items()))
    for name, column in (("raw", 3), ("grpo", 4)):
        (folder / f"{name}.trec").write_text(
            "".join(_run_lines(qid, row[2], row[column]) for qid, row in QUESTIONS.items())
        )
    for step in range(steps):
        add_step(folder / "grpo", step)
    return folder


def _run_lines(qid: str, gold: str, rank: int | None) -> str:
    docids = [f"x{place}" for place in range(1, 7)]
    if rank is not None:
        docids[rank - 1] = gold
    return "".join(f"{qid} Q0 {docid} {place} {20 - place} bm25\n" for place, docid in enumerate(docids, start=1))


def add_step(run: Path, step: int) -> None:
    """One more finished step of a GRPO run: its rollouts, then its line of metrics."""
    first = rollout("a_1", f"tall towers {step}", 1, 2.0), rollout("a_1", "many cats", 40, 0.7)
    second = rollout("b_1", SCRIPT, None, 0.0), rollout("b_1", "no tags at all", None, -0.1, "no_tag")
    dump(run, step, [Group(first), Group(second)])
    values = {
        "reward": 1 + step / 10,
        "kl": step / 100,
        "entropy": 0.3,
        "response_tokens": 40.0,
        "format_rate": 0.75,
        "mrr": 0.25,
    }
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class Reader(HTMLParser):
    """Checks that elements nest and that nothing comes from outside; keeps elements, ids and text."""

    VOID = ("meta", "link", "br", "line", "circle", "path", "input", "rect")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def chromium() -> str | None:
    names = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def browser_page(width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """A page of a headless Chromium that fails the test on any console error; skips where there is no browser."""
    folder = ROOT / ".venv" / "browser"
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
    api = pytest.importorskip(
        "playwright.sync_api",
        reason="needs playwright: pip install --target .venv/browser -r tests/requirements-browser.txt",
    )
    path = chromium()
    if path is None:
        pytest.skip("needs a Chromium: apt-get install chromium-headless-shell")
    faults: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        page.set_default_timeout(15_000)
        page.on(
            "console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        try:
            yield page
        finally:
            browser.close()
    assert faults == []


# Text nodes whose contrast with what lies behind them is under 4.5 (3 where the text is large), by WCAG 2.2.
FAINT = """() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; }
    return [255, 255, 255, 1];
  };
  const faint = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() || ["STYLE", "SCRIPT", "TITLE", "DESC", "title", "desc"].includes(element.tagName) || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), ink = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const a = light(parse(ink)), b = light(behind(element)), ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    seen += 1;
    if (ratio < 4.5) faint.push([node.data.trim().slice(0, 40), ink, ratio]);
  }
  return seen ? faint : ["no text"];
}"""


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours "#rrggbb", 1 to 21."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
