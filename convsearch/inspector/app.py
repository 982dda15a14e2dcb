"""The inspector's addresses: the page, and what it asks for under /api."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from convsearch.inspector.store import Filter, Run, compare

HERE = Path(__file__).parent
FILES = {
    "": (HERE / "page.html", "text/html"),
    "page.css": (HERE / "page.css", "text/css"),
    "pages.css": (HERE.parent / "pages.css", "text/css"),
    "page.js": (HERE / "page.js", "text/javascript"),
    "charts.js": (HERE / "charts.js", "text/javascript"),
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
Count = Annotated[int, Query(ge=1, le=200)]
Natural = Annotated[int, Query(ge=0, le=2**31 - 1)]


def create_app(runs: Sequence[Run]) -> FastAPI:
    """The application over one run or two. It answers to this machine's names alone, so that no other site's page can ask it through a browser."""
    app = FastAPI(title="inspector", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    @app.middleware("http")
    async def headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(LookupError)
    async def not_there(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error.args[0])}, 404)

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    def of(number: int) -> Run:
        if not 0 <= number < len(runs):
            raise LookupError(f"there is no run {number}: this page has {len(runs)}")
        return runs[number]

    @app.get("/api/runs")
    def names() -> Any:
        return [{"name": run.name, "folder": str(run.folder)} for run in runs]

    @app.get("/api/state")
    def state(request: Request, run: int = 0, version: str = "", offset: Natural = 0) -> Any:
        """New lines of metrics and the dumps that are there; 304 where nothing has changed since the ETag that the page has."""
        etag = of(run).etag()
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers={"etag": etag})
        steps = of(run).steps()
        about = {
            "steps": [step.number for step in steps],
            "rollouts": sum(step.rows for step in steps),
            "metrics": of(run).metrics(version, offset),
        }
        return JSONResponse(about, headers={"etag": etag})

    @app.get("/api/groups")
    def groups(step: Natural, run: int = 0, start: Natural = 0, count: Count = 10) -> Any:
        return of(run).groups(step, start, count)

    @app.get("/api/rollout")
    def rollout(step: Natural, row: Natural, run: int = 0) -> Any:
        return of(run).rollout(step, row)

    @app.get("/api/rollouts")
    def rollouts(
        run: int = 0,
        text: str = "",
        qid: str = "",
        error: str = "",
        rank: str = "",
        reward_min: float | None = None,
        reward_max: float | None = None,
        step_min: Natural = 0,
        step_max: Natural = 2**31 - 1,
        cursor: str = "",
        size: Count = 25,
    ) -> Any:
        return of(run).find(Filter(text, qid, error, rank, reward_min, reward_max, step_min, step_max), cursor, size)

    @app.get("/api/compare")
    def compared() -> Any:
        return compare(of(0), of(1))

    @app.get("/{name:path}")
    def file(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(404, f"there is no {name!r} here")
        path, kind = FILES[name]
        return Response(path.read_bytes(), media_type=f"{kind}; charset=utf-8")

    return app
