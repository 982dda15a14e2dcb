"""A page on a GRPO run, while it goes on or afterwards: ``python -m convsearch.inspect RUN_FOLDER [RUN_FOLDER2]``.

Curves, the newest steps' groups, a search over all rollouts, every rollout under an address of its own, two runs side by side. It reads what the
run leaves on disk and writes nothing. Only this machine can reach it.
"""

import argparse
import socket
from pathlib import Path

from convsearch.cli import command_parser
from convsearch.cli import run as run_main

HOST = "127.0.0.1"


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("convsearch.inspect", "Serves a page on one training run, or two to compare.")
    folders = "run folder of convsearch.grpo, or of scripts/quickstart.sh; at most two"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=folders)
    parser.add_argument("--port", type=int, default=8090, help="port on 127.0.0.1; 0 takes a free one")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if len(args.runs) > 2:
        raise ValueError(f"{len(args.runs)} runs were named; the page compares two at most")
    import uvicorn

    from convsearch.inspector.app import create_app
    from convsearch.inspector.store import Run

    app = create_app([Run(Path(folder)) for folder in args.runs])
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((HOST, args.port))
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cannot listen on {HOST} port {args.port} ({error}): choose another --port, 0 for any free one"
        ) from error
    bound.listen()  # who asks before the server is up waits, instead of being refused
    print(f"inspector: http://{HOST}:{bound.getsockname()[1]}/", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, server_header=False)).run(sockets=[bound])


if __name__ == "__main__":
    run_main(main)
