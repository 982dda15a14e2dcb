"""A page on a GRPO run, during the run or afterwards: ``python -m convsearch.inspect RUN_FOLDER [RUN_FOLDER2]``.

It shows curves, the groups of the newest steps, a search over all rollouts, each rollout under its own address, and two
runs side by side. It reads what the run writes to disk, and writes nothing. Only this machine can connect to it.
"""

import argparse
from pathlib import Path

from convsearch.cli import command_parser, run

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
    from uvicorn import Config, Server

    from convsearch.inspector.app import create_app
    from convsearch.inspector.store import Run
    from convsearch.pages import listen

    app = create_app([Run(Path(folder)) for folder in args.runs])
    bound = listen(HOST, args.port)
    print(f"inspector: http://{HOST}:{bound.getsockname()[1]}/", flush=True)
    Server(Config(app, log_config=None, access_log=False, server_header=False)).run(sockets=[bound])


if __name__ == "__main__":
    run(main)
