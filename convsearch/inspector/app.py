"""The inspector's addresses: the page, and the data that it reads under /api."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse

from convsearch import pages
from convsearch.inspector.store import Filter, Run, compare

HERE = Path(__file__).parent
FILES = {
    "/": HERE / "page.html",
    "/page.css": HERE / "page.css",
    "/pages.css": pages.STYLE,
    "/page.js": HERE / "page.js",
    "/charts.js": HERE / "charts.js",
    "/pages.js": pages.SCRIPT,
}
Count = Annotated[int, Query(ge=1, le=200)]
Natural = Annotated[int, Query(ge=0, le=2**31 - 1)]


def create_app(runs: Sequence[Run]) -> FastAPI:
    """The application over one run or two; only for this machine's host names, so that other sites' pages cannot read
    it."""
    routes = pages.file_routes(FILES)
    app = FastAPI(title="inspector", routes=routes, docs_url=None, redoc_url=None, openapi_url=None)
    pages.only_local_names(app)

    @app.middleware("http")
    async def headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(pages.HEADERS)
        return response

    @app.exception_handler(LookupError)
    async def missing(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error.args[0])}, 404)

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    add_api(app, runs)
    return app


def add_api(app: FastAPI, runs: Sequence[Run]) -> None:
    def of(number: int) -> Run:
        if not 0 <= number < len(runs):
            raise LookupError(f"there is no run {number}: this page has {len(runs)}")
        return runs[number]

    @app.get("/api/runs")
    def names() -> Any:
        return [{"name": run.name, "folder": str(run.folder)} for run in runs]

    @app.get("/api/state")
    def state(request: Request, run: int = 0, version: str = "", offset: Natural = 0) -> Any:
        """New lines of metrics, and the steps that have dumps; 304 if nothing has changed since the page's ETag."""
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
