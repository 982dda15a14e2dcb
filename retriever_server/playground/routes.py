"""The page at ``/``: a conversation, its rewrite, the passages found. It searches through /search and /rank.

Rewriters run in processes of their own (``python -m convsearch.converse``), started at their first question, so the
server loads no model. None of these addresses is in /openapi.json, which is the interface for scripts.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException
from pydantic import Field

from convsearch import pages
from convsearch.prompts import STYLES
from retriever_server.serving.schemas import Strict
from retriever_server.serving.service import Service
from retriever_server.text.highlight import marked

HERE = Path(__file__).parent
FILES = {
    "/": HERE / "page.html",
    "/playground/page.css": HERE / "page.css",
    "/playground/pages.css": pages.STYLE,
    "/playground/page.js": HERE / "page.js",
    "/playground/pages.js": pages.SCRIPT,
}
ANSWER_S = 300  # a rewriter's first answer includes loading its model


class RewriteRequest(Strict):
    rewriter: str
    question: Annotated[str, Field(min_length=1)]
    context: list[str] = Field(default_factory=list)
    style: Annotated[str, Field(pattern=f"^({'|'.join(STYLES)})$")] = "paper"
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1


class MarkRequest(Strict):
    query: str
    texts: Annotated[list[str], Field(max_length=100)]


def rewriter_commands(arguments: Sequence[str], style: str = "paper") -> dict[str, list[str]]:
    """name -> the command of its process, from NAME=FOLDER or NAME=http://HOST/v1[#MODEL].

    Raises:
        ValueError: an argument has another form, a folder is missing, or a name is given twice.
    """
    commands: dict[str, list[str]] = {}
    for argument in arguments:
        name, separator, target = argument.partition("=")
        if not separator or not name or not target:
            raise ValueError(f"--rewriter {argument!r} is not NAME=FOLDER or NAME=http://HOST/v1")
        if name in commands:
            raise ValueError(f"two rewriters are called {name!r}: give each its own name")
        remote = target.startswith(("http://", "https://"))
        if not remote and not Path(target).is_dir():
            raise ValueError(f"--rewriter {name}: there is no model folder {target}")
        source = ["--endpoint", target] if remote else ["--model_name_or_path", target]
        commands[name] = [sys.executable, "-m", "convsearch.converse", *source, "--prompt_style", style]
    return commands


class Child:
    """A rewriter's process; it answers one question at a time, in the order of arrival."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name, self.command = name, command
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = asyncio.Lock()

    async def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The process's answer to a line; starts the process if it does not run.

        Raises:
            HTTPException: 422 if it refuses, 502 if it ends or does not answer in time.
        """
        async with self._lock:
            exchange = asyncio.create_task(asyncio.to_thread(self._exchange, json.dumps(question).encode() + b"\n"))
            done, _ = await asyncio.wait({exchange}, timeout=ANSWER_S)
            if not done:
                self.stop()  # which ends the thread's reading
                what = f"rewriter {self.name!r} gave no answer in {ANSWER_S} s and was stopped"
                raise HTTPException(502, f"{what}: ask again")
            line = exchange.result()
        if not line:
            raise HTTPException(502, f"rewriter {self.name!r} has ended: the server's own output has the reason")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise HTTPException(422, answer["refused"])
        return answer

    def _exchange(self, line: bytes) -> bytes:
        """b"" if the process ends instead of answering."""
        process = self._process
        if process is None or process.poll() is not None:
            # in its own session, so that Ctrl-C reaches only the server, which ends the process when it stops
            pipe = subprocess.PIPE
            process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, start_new_session=True)
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


def playground(service: Service, rewriters: Mapping[str, Sequence[str]], style: str = "paper") -> APIRouter:
    """The page's addresses. ``rewriters``: name -> command, as rewriter_commands makes them."""
    children = {name: Child(name, command) for name, command in rewriters.items()}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for child in children.values():
            child.stop()

    router = APIRouter(routes=pages.file_routes(FILES), lifespan=lifespan, include_in_schema=False)

    @router.get("/playground/about")
    async def about() -> dict[str, Any]:
        indexes = [
            {"name": name, "retriever": index.name, "passages": index.num_passages}
            for name, index in service.indexes.items()
        ]
        return {"indexes": indexes, "rewriters": list(children), "style": style, "styles": STYLES}

    @router.post("/playground/rewrite")
    async def rewrite(body: RewriteRequest) -> dict[str, Any]:
        if body.rewriter not in children:
            known = ", ".join(children) or "none: start it with --rewriter NAME=FOLDER"
            raise HTTPException(404, f"there is no rewriter {body.rewriter!r} here: this server has {known}")
        service.check([" ".join([*body.context, body.question])])
        return await children[body.rewriter].ask(body.model_dump(exclude={"rewriter"}))

    @router.post("/playground/marks")
    async def marks(body: MarkRequest) -> dict[str, Any]:
        """Each text in pieces [text, whether it answers the query]."""
        service.check([body.query, *body.texts])
        return {"texts": await asyncio.to_thread(lambda: [marked(body.query, text) for text in body.texts])}

    return router
