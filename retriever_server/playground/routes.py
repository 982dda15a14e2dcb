"""The page at ``/``: a conversation, its rewrite, the passages that it finds. It searches through /search and /rank as any client does.

Rewriters run in processes of their own (``python -m convsearch.converse``), started at their first question, so the server loads no model.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Response
from pydantic import Field

from convsearch import files
from retriever_server.playground.highlight import marked
from retriever_server.serving.schemas import Strict
from retriever_server.serving.service import Service

HERE = Path(__file__).parent
FILES = {
    "/": (HERE / "page.html", "text/html"),
    "/playground/page.css": (HERE / "page.css", "text/css"),
    "/playground/pages.css": (Path(files.__file__).with_name("pages.css"), "text/css"),
    "/playground/page.js": (HERE / "page.js", "text/javascript"),
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
ANSWER_S = 300  # a rewriter's first answer includes loading its model


class RewriteRequest(Strict):
    rewriter: str
    question: Annotated[str, Field(min_length=1)]
    context: list[str] = Field(default_factory=list)
    style: Literal["paper", "compact"] = "paper"
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1


class MarkRequest(Strict):
    query: str
    texts: Annotated[list[str], Field(max_length=100)]


def rewriter_commands(arguments: Sequence[str], style: str = "paper") -> dict[str, list[str]]:
    """name -> the command of its process, from NAME=FOLDER or NAME=http://HOST/v1[#MODEL].

    Raises:
        ValueError: an argument is of another form, a folder is not there, or a name is given twice.
    """
    commands: dict[str, list[str]] = {}
    for argument in arguments:
        name, separator, target = argument.partition("=")
        if not separator or not name or not target:
            raise ValueError(f"--rewriter {argument!r} is not NAME=FOLDER or NAME=http://HOST/v1")
        if name in commands:
            raise ValueError(f"two rewriters are called {name!r}: give each a name of its own")
        remote = target.startswith(("http://", "https://"))
        if not remote and not Path(target).is_dir():
            raise ValueError(f"--rewriter {name}: there is no model folder {target}")
        source = ["--endpoint", target] if remote else ["--model_name_or_path", target]
        commands[name] = [sys.executable, "-m", "convsearch.converse", *source, "--prompt_style", style]
    return commands


class Child:
    """A rewriter's process; one question at a time, in the order they come."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name, self.command = name, command
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = asyncio.Lock()

    async def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The process's answer to a line; it is started where it does not run.

        Raises:
            HTTPException: 422 where it refuses, 502 where it ends or gives no answer in time.
        """
        async with self._lock:
            exchange = asyncio.create_task(asyncio.to_thread(self._exchange, json.dumps(question).encode() + b"\n"))
            done, _ = await asyncio.wait({exchange}, timeout=ANSWER_S)
            if not done:
                self.stop()  # which ends the thread's reading
                raise HTTPException(
                    502, f"rewriter {self.name!r} gave no answer in {ANSWER_S} s and was stopped: ask again"
                )
            line = exchange.result()
        if not line:
            raise HTTPException(502, f"rewriter {self.name!r} has ended: the server's own output has the reason")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise HTTPException(422, answer["refused"])
        return answer

    def _exchange(self, line: bytes) -> bytes:
        """b"" where the process ends instead of answering."""
        process = self._process
        if process is None or process.poll() is not None:
            # a session of its own: Ctrl-C is for the server, which ends the process when it stops, or by closing its input
            process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
            self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        answer = b""
        with suppress(BrokenPipeError):
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        if not answer:
            self.stop()
        return answer

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(BrokenPipeError), process:  # closes its pipes and waits for it
                pass


class Playground:
    """The page's addresses; none of them stands in /openapi.json, which is the interface that others script against."""

    def __init__(self, service: Service, rewriters: Mapping[str, Sequence[str]], style: str = "paper") -> None:
        self.service, self.style = service, style
        self.children = {name: Child(name, command) for name, command in rewriters.items()}

    def add_to(self, app: FastAPI) -> None:
        for path in FILES:
            app.get(path, include_in_schema=False)(self.file(path))
        app.get("/playground/about", include_in_schema=False)(self.about)
        app.post("/playground/rewrite", include_in_schema=False)(self.rewrite)
        app.post("/playground/marks", include_in_schema=False)(self.marks)

    def close(self) -> None:
        for child in self.children.values():
            child.stop()

    def file(self, path: str) -> Any:
        source, kind = FILES[path]

        async def answer() -> Response:
            return Response(source.read_bytes(), media_type=f"{kind}; charset=utf-8", headers=HEADERS)

        return answer

    async def about(self) -> dict[str, Any]:
        indexes = [
            {"name": name, "retriever": index.name, "passages": index.num_passages}
            for name, index in self.service.indexes.items()
        ]
        return {"indexes": indexes, "rewriters": list(self.children), "style": self.style}

    async def rewrite(self, body: RewriteRequest) -> dict[str, Any]:
        if body.rewriter not in self.children:
            known = ", ".join(self.children) or "none: start it with --rewriter NAME=FOLDER"
            raise HTTPException(404, f"there is no rewriter {body.rewriter!r} here: this server has {known}")
        self.service.check([" ".join([*body.context, body.question])])
        return await self.children[body.rewriter].ask(body.model_dump(exclude={"rewriter"}))

    async def marks(self, body: MarkRequest) -> dict[str, Any]:
        """Each text in pieces [text, whether it answers the query]."""
        self.service.check([body.query, *body.texts])
        return {"texts": await asyncio.to_thread(lambda: [marked(body.query, text) for text in body.texts])}
