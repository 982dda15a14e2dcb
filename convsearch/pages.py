"""What the servers of the pages share: security headers, the addresses of static files, and a listening socket."""

import socket
from collections.abc import Mapping
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

HERE = Path(__file__).parent
STYLE, SCRIPT = HERE / "pages.css", HERE / "pages.js"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def only_local_names(app: Starlette) -> None:
    """Refuses requests under another host name, by which a page of another site could read from this machine."""
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_NAMES)


def file_routes(files: Mapping[str, Path]) -> list[BaseRoute]:
    """Address -> file as routes, with HEADERS."""

    def answer(request: Request) -> Response:
        path = files[request.url.path]
        return Response(path.read_bytes(), media_type=f"{TYPES[path.suffix]}; charset=utf-8", headers=HEADERS)

    return [Route(address, answer) for address in files]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket (port 0: any free one). Clients that connect before the server is ready wait.

    Raises:
        ValueError: the address is taken, or is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns off Nagle's algorithm only if the protocol is given; with it every answer would take 40 ms
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(2048)
    except (OSError, OverflowError) as error:
        bound.close()
        remedy = "choose another --port, 0 for any free one"
        raise ValueError(f"cannot listen on {host} port {port} ({error}): {remedy}") from error
    return bound
