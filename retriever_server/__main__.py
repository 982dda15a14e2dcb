"""``python -m retriever_server``: see retriever_server.server."""

from convsearch.cli import run
from retriever_server.server import main

if __name__ == "__main__":
    run(main)
