"""The playground: its addresses over a real socket, rewriters in processes of their own, and the page in a browser."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from fastapi import FastAPI
from helpers_pages import FAINT, ROOT, SCRIPT, Reader, browser_page
from helpers_retriever import build_bm25, running, until

from convsearch.generation.answers import answer
from convsearch.pages import TYPES
from retriever_server.bm25.index import Bm25Index
from retriever_server.playground.routes import FILES, playground, rewriter_commands
from retriever_server.serving.app import create_app
from retriever_server.serving.schemas import Limits

PASSAGES = {
    "p1": "Hamlet is a tragedy by William Shakespeare",
    "p2": "Anne Hathaway was the wife of William Shakespeare",
    "p3": f"Markup {SCRIPT} in a passage about wives",
    **{f"x{i}": f"A filler about wife number {i}" for i in range(12)},
}
# A stand-in for convsearch.converse: it answers a line with what the question asks of it.
FAKE = """
import json, os, sys
for line in sys.stdin:
    q = json.loads(line)
    if q["question"] == "crash": sys.exit(3)
    if q["question"] == "refuse": print(json.dumps({"refused": "no, thank you"}), flush=True); continue
    rewrite = None if q["question"] == "broken" else f"{q['question']} William Shakespeare"
    thinking = f"<b>{len(q['context'])} turns</b> {q['style']} {q['seed']} {os.getpid()}"
    print(json.dumps({"rewrite": rewrite, "thinking": thinking, "output": "o",
                      "error": None if rewrite else "no_tag", "seconds": 0.25}), flush=True)
"""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Bm25Index:
    root = tmp_path_factory.mktemp("playground")
    (root / "c.jsonl").write_text(
        "\n".join(json.dumps({"id": docid, "contents": text}) for docid, text in PASSAGES.items())
    )
    return build_bm25(root / "c.jsonl", root / "index")


def app_of(indexes: dict[str, Any], rewriters: dict[str, list[str]]) -> FastAPI:
    app = create_app(indexes, limits=Limits(query_chars=1_000))
    app.include_router(playground(app.state.service, rewriters))
    return app


@pytest.fixture(scope="module")
def server(index: Bm25Index) -> Iterator[httpx.Client]:
    with running(app_of({"plays": index, "again": index}, {"fake": [sys.executable, "-c", FAKE]})) as client:
        yield client


def ask(server: httpx.Client, question: str, **more: Any) -> httpx.Response:
    return server.post("/playground/rewrite", json={"rewriter": "fake", "question": question} | more)


def test_the_page_is_served_with_a_strict_policy(server: httpx.Client) -> None:
    answer = server.get("/")
    page = Reader(answer.text)
    assert "main" in dict(page.elements)
    links = [attributes[key] for _, attributes in page.elements for key in ("href", "src") if key in attributes]
    assert all(link and (link.startswith(("#", "data:")) or f"/{link}" in FILES) for link in links)
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on") or key == "style"]
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    for path, file in FILES.items():
        assert server.get(path).headers["content-type"] == f"{TYPES[file.suffix]}; charset=utf-8"
    script = "".join(path.read_text() for path in FILES.values() if path.suffix == ".js")
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script) == []


def test_every_field_has_a_label(server: httpx.Client) -> None:
    page = Reader(server.get("/").text)
    fields = [attributes["id"] for name, attributes in page.elements if name in ("input", "select", "textarea")]
    labelled = {attributes.get("for") for name, attributes in page.elements if name == "label"}
    wrapped = set(re.findall(r"<label[^>]*>[^<]+<(?:input|select) id=\"(\w+)\"", server.get("/").text))
    assert set(fields) <= labelled | wrapped
    assert len(fields) == 7


def test_what_there_is_to_choose(server: httpx.Client) -> None:
    about = server.get("/playground/about").json()
    assert [index["name"] for index in about["indexes"]] == ["plays", "again"]
    assert (about["rewriters"], about["style"], about["styles"]) == (["fake"], "paper", ["paper", "compact"])


def test_the_wire_is_as_it_was(server: httpx.Client) -> None:
    assert set(server.get("/openapi.json").json()["paths"]) == {
        "/rank",
        "/search",
        "/missing",
        "/similarity",
        "/retrieve",
        "/health",
        "/metrics",
    }


def test_marks_follow_the_analyzer(server: httpx.Client) -> None:
    body = {"query": "wives of Shakespeare", "texts": [PASSAGES["p2"], ""]}
    pieces = server.post("/playground/marks", json=body).json()["texts"]
    assert [text for text, hit in pieces[0] if hit] == [
        "Shakespeare"
    ]  # Porter's stems: wive is not wife, and "of" is no term
    assert pieces[1] == []
    pieces = server.post("/playground/marks", json={"query": "tragedies", "texts": [PASSAGES["p1"]]}).json()["texts"]
    assert [text for text, hit in pieces[0] if hit] == ["tragedy"]


def test_a_rewriter_answers_and_keeps_its_process(server: httpx.Client) -> None:
    first, second = (
        ask(server, "his wife?", context=["who wrote Hamlet?", "he"], style="compact", seed=7).json() for _ in range(2)
    )
    assert first == second  # with the process id in it
    assert first["rewrite"] == "his wife? William Shakespeare"
    assert first["thinking"].startswith("<b>2 turns</b> compact 7 ")


def test_a_rewriter_that_ends_is_said_and_started_anew(server: httpx.Client) -> None:
    before = ask(server, "x").json()["thinking"].split()[-1]
    ended = ask(server, "crash")
    assert ended.status_code == 502
    assert "rewriter 'fake' has ended" in ended.json()["detail"]
    assert ask(server, "x").json()["thinking"].split()[-1] != before


def test_questions_at_once_get_their_own_answers(server: httpx.Client) -> None:
    answers: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: answers.update({i: ask(server, f"q{i}").json()["rewrite"]}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: f"q{i} William Shakespeare" for i in range(8)}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"rewriter": "none", "question": "x"}, 404, "there is no rewriter 'none' here: this server has fake"),
        ({"rewriter": "fake", "question": ""}, 422, "question"),
        ({"rewriter": "fake", "question": "x", "style": "long"}, 422, "style"),
        ({"rewriter": "fake", "question": "refuse"}, 422, "no, thank you"),
        ({"rewriter": "fake", "question": "x" * 2_000}, 422, "the limit is 1000"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    server: httpx.Client, body: dict[str, Any], status: int, words: str
) -> None:
    answer = server.post("/playground/rewrite", json=body)
    assert answer.status_code == status
    assert words in answer.json()["detail"]


def test_the_processes_end_with_the_server(index: Bm25Index) -> None:
    with running(app_of({"plays": index}, {"fake": [sys.executable, "-c", FAKE]})) as client:
        pid = ask(client, "x").json()["thinking"].split()[-1]
        assert Path(f"/proc/{pid}").exists()
    until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])


def test_rewriters_on_the_command_line(tmp_path: Path) -> None:
    commands = rewriter_commands([f"mine={tmp_path}", "far=http://127.0.0.1:1/v1#big=model"], "compact")
    assert commands["mine"][1:] == [
        "-m",
        "convsearch.converse",
        "--model_name_or_path",
        str(tmp_path),
        "--prompt_style",
        "compact",
    ]
    assert commands["far"][3:5] == ["--endpoint", "http://127.0.0.1:1/v1#big=model"]
    for arguments, words in (
        (["x"], "is not NAME=FOLDER"),
        ([f"a={tmp_path}"] * 2, "two rewriters are called 'a'"),
        (["a=/none"], "no model folder"),
    ):
        with pytest.raises(ValueError, match=words):
            rewriter_commands(arguments)


def test_a_line_of_the_rewriter_process() -> None:
    def generate(conversation: Any, style: str, seed: int) -> Any:
        rewrite = f"{conversation.history[0].answer}: {conversation.question}"
        return f"<think>{style} {seed}</think>\n<rewrite>{rewrite}</rewrite>", "stop"

    line = json.dumps({"context": ["who?", "he"], "question": "and she?"})
    found = answer(line, generate, "compact")
    assert (found["rewrite"], found["thinking"], found["error"]) == ("he: and she?", "compact 1", None)
    assert answer(line, lambda *_: ("no tags", "stop"), "paper")["error"] == "no_tag"
    assert "must be a list of strings" in answer('{"question": "x", "context": ["one"]}', generate, "paper")["refused"]
    assert "JSON object" in answer("[1]", generate, "paper")["refused"]
    assert "'style' must be one of" in answer('{"question": "x", "style": "?"}', generate, "paper")["refused"]


class OpenAI(BaseHTTPRequestHandler):
    """The little of OpenAI's interface that a rewriter needs; it keeps what it was asked."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "first-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body | {"key": self.headers.get("authorization")})
        if body["model"] == "broken":
            self._answer({"error": f"no such model, {self.headers.get('authorization')}"}, 404)
            return
        message = {"content": "<think>a thought</think>\n<rewrite>who was his wife?</rewrite>"}
        self._answer({"choices": [{"message": message, "finish_reason": "stop"}]})

    def _answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def openai() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), OpenAI)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def converse(*arguments: str, key: str = "") -> list[dict[str, Any]]:
    """The answers of a rewriter's process to one line."""
    line = json.dumps({"context": ["who wrote Hamlet?", "Shakespeare"], "question": "his wife?", "seed": 5})
    environment = {"PATH": "/usr/bin", "OPENAI_API_KEY": key, "no_proxy": "*"}
    command = [sys.executable, "-m", "convsearch.converse", *arguments]
    done = subprocess.run(command, input=line, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    return [json.loads(answered) for answered in done.stdout.splitlines()]


def test_an_endpoint_of_openais_kind() -> None:
    """Its first model unless one is named; the key from the environment, which no answer shows; a fault is a
    sentence."""
    with openai() as url:
        OpenAI.asked.clear()
        (found,) = converse("--endpoint", url, "--prompt_style", "compact", key="secret-1")
        assert (found["rewrite"], found["thinking"]) == ("who was his wife?", "a thought")
        body = OpenAI.asked[0]
        assert (body["model"], body["seed"], body["key"]) == ("first-model", 5, "Bearer secret-1")
        assert body["messages"][0]["content"].startswith("Rewrite the last question")
        (refused,) = converse("--endpoint", f"{url}#broken", key="secret-1")
        assert "answered 404" in refused["refused"]
        assert "secret-1" not in refused["refused"]
    (refused,) = converse("--endpoint", url)
    assert "did not answer" in refused["refused"]


@pytest.mark.slow
def test_a_model_of_ours_in_its_own_process(index: Bm25Index, form_llama: Path) -> None:
    with running(app_of({"plays": index}, rewriter_commands([f"tiny={form_llama}"], "compact"))) as client:
        client.timeout = httpx.Timeout(120)
        body = {"rewriter": "tiny", "question": "what is it?", "context": [], "style": "compact"}
        found = client.post("/playground/rewrite", json=body).json()
        assert {"rewrite", "thinking", "output", "error", "seconds"} == set(found)
        assert client.post("/playground/rewrite", json=body).json()["output"] == found["output"]  # the same seed
        assert found["output"]


def typed(page: Any, talk: str) -> None:
    page.get_by_label("Conversation, the last line").fill(talk)


@pytest.mark.slow
def test_in_a_browser_by_keyboard(server: httpx.Client) -> None:
    with browser_page() as page:
        page.goto(str(server.base_url))
        page.wait_for_selector("#served:not(:empty)")
        assert page.evaluate("document.activeElement.id") == "talk"
        page.keyboard.type("Q: who wrote Hamlet?\nA: Shakespeare\nQ: and his wife?")
        assert page.locator("#parsed li").all_text_contents() == [
            "Qwho wrote Hamlet?",
            "AShakespeare",
            "Qand his wife?",
        ]
        page.get_by_label("Gold passages").fill("p2")
        page.get_by_label("Rewriter").select_option("fake")
        page.get_by_label("Conversation, the last line").focus()
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("text=query: rank 1")
        assert page.locator("#thinking").inner_text().startswith("<b>2 turns</b>")  # as text
        assert page.locator("#passages li").first.locator("mark").all_text_contents() == [
            "wife",
            "William",
            "Shakespeare",
        ]
        assert page.locator("#passages li.gold").count() == 1
        page.get_by_label("Query that is searched").fill("markup")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=/^1 passage$/")
        assert SCRIPT in page.locator("#passages li").inner_text()
        assert "query: not in the first 1,000" in page.locator("#ranks").inner_text()
        page.get_by_role("button", name="Clear").click()
        assert page.evaluate("document.activeElement.id") == "talk"


@pytest.mark.slow
def test_in_a_browser_what_goes_wrong_is_said(server: httpx.Client) -> None:
    with browser_page() as page:
        page.goto(str(server.base_url))
        page.wait_for_selector("#served:not(:empty)")
        page.get_by_role("button", name="Search", exact=True).click()
        page.wait_for_selector("text=Type a question")
        typed(page, "who?\nhe")
        page.get_by_role("button", name="Search", exact=True).click()
        assert "must begin and end with a question" in page.locator("#fault").inner_text()
        typed(page, "broken")
        page.get_by_label("Rewriter").select_option("fake")
        page.get_by_role("button", name="Search", exact=True).click()
        page.wait_for_selector("text=No rewrite could be read (no_tag)")
        typed(page, json.dumps({"question": "his wife?", "context": ["who?", "he"], "gold_docids": ["p2"]}))
        assert page.locator("#gold").input_value() == "p2"
        page.get_by_label("Rewriter").select_option("")
        page.get_by_role("button", name="Search", exact=True).click()
        page.wait_for_selector("text=Gold passage: query: rank")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_it_fits_and_is_readable(server: httpx.Client, width: int, scheme: str) -> None:
    with browser_page(width, scheme) as page:
        page.goto(str(server.base_url))
        page.wait_for_selector("#served:not(:empty)")
        page.get_by_label("Rewriter").select_option("fake")
        page.get_by_role("button", name="Example").click()
        page.get_by_label("Gold passages").fill("p2")
        page.keyboard.press("Enter")
        page.wait_for_selector("#passages li")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(FAINT) == []
