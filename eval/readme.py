"""The README's table of results, from run folders that differ in their seed: ``python -m eval.readme RUN RUN RUN``.

Measures the folders' runs again and draws ten rewrites of the first folder by a fixed seed. With ``--write README.md``
both go between the marks ``<!-- table:begin -->`` and ``<!-- table:end -->``; else they are printed. ``python -m
convsearch.plots`` draws the curves beside it.
"""

import argparse
from pathlib import Path

from convsearch.cli import command_parser, run
from convsearch.files import atomic_write


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("eval.readme", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of the same job with different seeds")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file for the table (default: print it)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    from eval.readme_table import drawn, markdown, replaced

    table = f"{markdown(args.runs)}\n{drawn(args.runs[0])}"
    if args.write:
        text = replaced(args.write.read_text(encoding="utf-8"), table, str(args.write))
        with atomic_write(args.write) as file:
            file.write(text)
    else:
        print(table, end="")


if __name__ == "__main__":
    run(main)
