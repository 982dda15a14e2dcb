"""The first questions of a conversations file with their qrels.

    python -m data_preprocess.subset --input data/demo/test.json --qrels data/demo/test.trec --limit 100 --output DIR

Writes DIR/test.json, the first N lines unchanged, and DIR/test.trec, the lines of the qrels whose query is among them.
"""

import argparse
from itertools import islice
from pathlib import Path

from convsearch import cli
from convsearch.files import atomic_write, read_jsonl


def build_parser() -> argparse.ArgumentParser:
    parser = cli.command_parser("data_preprocess.subset", __doc__)
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="JSON", help="conversations, one turn per line")
    add("--qrels", type=Path, required=True, metavar="TREC", help="qrels of the conversations: qid 0 docid grade")
    add("--limit", type=int, metavar="N", help="how many questions (default: all)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for <name>.json and <name>.trec")
    add("--name", default="test", help="name of the two files")
    return parser


def subset(conversations: Path, qrels: Path, limit: int | None, output: Path, name: str = "test") -> dict[str, int]:
    """Writes ``<output>/<name>.json`` and ``<output>/<name>.trec``; returns the counts of their lines.

    Raises:
        ValueError: the limit is below 1, there is no question, or a line has no qid or is malformed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}: leave it out for all questions")
    found = dict.fromkeys(_qids(conversations, limit), False)  # -> whether the qrels have it
    if not found:
        raise ValueError(f"{conversations} has no question: give a conversations file, one turn per line")
    num_qrels = 0
    with qrels.open("rb") as lines, atomic_write(output / f"{name}.trec", "wb") as file:
        for line in lines:
            qid = b"".join(line.split(maxsplit=1)[:1])
            if qid in found:
                found[qid] = True
                file.write(line.removesuffix(b"\n") + b"\n")
                num_qrels += 1
    with conversations.open("rb") as lines, atomic_write(output / f"{name}.json", "wb") as file:
        file.writelines(islice(lines, limit))
    without = list(found.values()).count(False)
    return {"questions": len(found), "qrels": num_qrels, "questions without qrels": without}


def _qids(conversations: Path, limit: int | None) -> list[bytes]:
    qids = []
    for number, record in read_jsonl(conversations):
        if limit is not None and number > limit:
            break
        if not isinstance(record.get("qid"), str):
            raise ValueError(f"{conversations}:{number}: needs 'qid' (a string), got {record.get('qid')!r}")
        qids.append(record["qid"].encode())
    return qids


def main() -> None:
    args = build_parser().parse_args()
    counts = subset(args.input, args.qrels, args.limit, args.output, args.name)
    shown = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    print(f"wrote {args.name}.json, {args.name}.trec in {args.output}: {shown}")


if __name__ == "__main__":
    cli.run(main)
