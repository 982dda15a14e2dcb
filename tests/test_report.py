"""The report of a run: its figures by hand, nothing that a browser would fetch or run, its look in a browser."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers_pages import FAINT, SCRIPT, Reader, browser_page, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import report_charts, report_data, report_sections
from eval.report import main
from eval.report_html import tag
from eval.report_page import report
from retriever_server.text.highlight import marked


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "demo")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return report(run, draws=200)


def test_the_page_is_complete_and_fetches_and_runs_nothing(html: str) -> None:
    page = Reader(html)
    names = {name for name, _ in page.elements}
    assert names.isdisjoint({"script", "img", "iframe", "object", "form", "base"})
    links = [attributes[key] for _, attributes in page.elements for key in ("href", "src") if key in attributes]
    assert all(link and link.startswith(("#", "data:")) for link in links)
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on") or key == "style"]
    assert "@import" not in html
    assert "url(" not in html
    assert SCRIPT in page.text  # as text, in a question and in its rewrite's thinking
    assert f"thinking {SCRIPT}" in page.text


def test_figures_by_hand(html: str) -> None:
    """Raw ranks 1, none, 4, 1: MRR 0.5625. After GRPO 1, 1, 2, none: 0.625, one better by 1, one by 1/4, one worse."""
    page = Reader(html)
    assert "raw question 56.2 " in page.text
    assert "after GRPO 62.5" in page.text
    assert "against raw question +6.2" in page.text
    assert "2 / 1 / 1" in page.text
    assert "2 questions better, 1 the same, 1 worse." in page.text
    wins, losses = page.text.split("Biggest wins")[1].split("Biggest losses")
    assert wins.index("and his wife? not found → rank 1") < wins.index("rank 4 → rank 2")
    assert "what is a fjord? rank 1 → not found" in losses
    assert "d4 gold" in losses


def test_charts_have_names_and_words(html: str) -> None:
    page = Reader(html)
    charts = [attributes for name, attributes in page.elements if name == "svg" and attributes.get("role") == "img"]
    assert len(charts) == 7  # six metrics and the ranks
    assert "Reward, mean over samples" in page.text
    assert "training: from 1 to 1.2, lowest 1, highest 1.2" in page.text
    assert "rank 1: 25% in step 1, 25% in step 3" in page.text
    assert "no rewrite: 25% in step 1" in page.text


def test_the_index_gives_passages_their_text(run: Path) -> None:
    class Index:
        def missing(self, docids: list[str]) -> list[str]:
            return [docid for docid in docids if docid == "d4"]

        def contents(self, docids: list[str]) -> list[str]:
            return [f"The rewrites of {docid} <i>" for docid in docids]

    page = report(run, Index(), draws=200)  # type: ignore[arg-type]
    assert "The <mark>rewrites</mark> <mark>of</mark>" not in page  # "of" is a stop word
    assert "The <mark>rewrites</mark> of d2 &lt;i&gt;" in page


def test_figures_that_do_not_agree_are_named(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(run, folder)
    (folder / "results.json").write_text(json.dumps({"raw question": {"MRR": 0.5625}, "after GRPO": {"MRR": 0.7}}))
    assert "after GRPO, MRR: results.json has 70.00, the run gives 62.50" in Reader(report(folder, draws=200)).text
    (folder / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        report(folder)


def test_a_training_run_alone_has_its_curves(run: Path) -> None:
    page = Reader(report(run / "grpo"))
    assert "Gold rank over time" in page.text
    assert "Results" not in page.text.replace("Skip to the results", "")


def test_a_half_written_line_of_metrics_is_left_out(run: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text((run / "grpo" / "metrics.jsonl").read_text() + '{"step": 3, "rew')
    assert [record["step"] for record in report_data.read_metrics(tmp_path)] == [0, 1, 2]


def test_a_folder_without_a_run_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has neither"):
        report(tmp_path)
    with pytest.raises(ValueError, match="there is no run folder"):
        report(tmp_path / "none")


def test_command_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["report", str(run), "--output", str(tmp_path / "r.html"), "--draws", "100", "--cases", "1"]
    )
    main()
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'r.html'}: ")
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("prefix", "size", "gold", "expected"),
    [
        ("topiocqa-dev_", 2514, "1234", "TopiOCQA"),
        ("topiocqa-dev_", 500, "1234", None),
        ("topiocqa-dev_", 2514, "proxy-1234", None),
        ("QReCC-Test_", 8209, "x", "QReCC"),
        ("demo-test_", 2514, "x", None),
    ],
)
def test_the_papers_figures_are_shown_for_whole_test_sets_only(
    prefix: str, size: int, gold: str, expected: str | None
) -> None:
    qids = [f"{prefix}{i}" for i in range(size)]
    assert report_sections.paper_set(qids, {qids[0]: [gold]}) == expected


def test_the_papers_figures_are_the_facts() -> None:
    facts = Path(__file__).resolve().parents[2] / "shared" / "reference" / "facts.md"
    if not facts.is_file():
        pytest.skip("needs ../shared/reference/facts.md")
    rows = re.findall(r"\| (BM25|ANCE) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", facts.read_text())
    written = {
        tuple(float(v) for v in re.findall(r"[\d.]+", part))
        for _, _, *cells in rows
        for cell in cells
        for part in cell.split("->")
    }
    ours = {tuple(values) for systems in report_sections.PAPER.values() for values in systems.values()}
    assert ours <= written
    assert len(ours) >= 20


@pytest.mark.parametrize(("rank", "place"), [(1, 0), (2, 1), (10, 1), (11, 2), (100, 2), (900, 2), (None, 3)])
def test_buckets(rank: int | None, place: int) -> None:
    assert report_data.bucket(rank) == place


def test_ticks_and_running_means_by_hand() -> None:
    assert report_charts.ticks(0.1, 1.9) == [0, 0.5, 1, 1.5, 2]
    assert report_charts.ticks(3, 3) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert report_charts.running_mean([(1, 2), (2, 4), (3, 9)], 2) == [(1, 2), (2, 3), (3, 6.5)]


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_ticks_enclose_the_values(low: float, span: float) -> None:
    high = low + span
    marks = report_charts.ticks(low, high)
    assert marks[0] <= low + 1e-6 * (abs(low) + span)
    assert marks[-1] >= high - 1e-6 * (abs(high) + span)
    assert 2 <= len(marks) <= 12 or not high > low


@given(st.text(st.characters(), max_size=60))
def test_text_never_becomes_markup(said: str) -> None:
    built = tag("p", said, title=said)
    reader = Reader(built)
    assert [name for name, _ in reader.elements] == ["p"]
    assert built.encode("utf-8").startswith(b"<p title=")


def test_marked_words_by_hand() -> None:
    assert marked("dogs run", "A dog, running") == [("A ", False), ("dog", True), (", ", False), ("running", True)]
    assert marked("cat", "category concatenate") == [("category concatenate", False)]
    assert marked("the", "the") == [("the", False)]
    assert marked("naïve 東京", "Naïve 東京!") == [
        ("Naïve", True),
        (" ", False),
        ("東", True),
        ("京", True),
        ("!", False),
    ]
    assert marked("x", "") == []


@settings(max_examples=30)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.text(max_size=20))
def test_marked_pieces_are_the_text(passage: str, query: str) -> None:
    assert "".join(piece for piece, _ in marked(query, passage)) == passage


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(run: Path, tmp_path: Path, width: int, scheme: str) -> None:
    """Every text readable, nothing wider than the window, the cards open by keyboard, no word in the console."""
    (tmp_path / "report.html").write_text(report(run, draws=200))
    with browser_page(width, scheme) as page:
        page.goto((tmp_path / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator(".case summary").nth(1).focus()
        page.keyboard.press("Enter")
        assert page.locator(".case").nth(1).get_attribute("open") is not None
        assert page.evaluate(FAINT) == []
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(245, 246, 249)" if scheme == "light" else "rgb(16, 20, 26)"
        )
