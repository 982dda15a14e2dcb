"""QReCC (Anantha et al., NAACL 2021) as in the SCAI-QReCC-21 shared task: its files, its turns and its collection.

Turns are a JSON array (scai-qrecc21-{training,test}-turns.json), the 54.6 million passages are the .jsonl files inside
passages.zip, which is read as a stream. Passages keep their own ids (URL and paragraph). Blank passages stay in the
collection, as in the reference, and are counted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_preprocess.sources import BadRecords, Record, Source, locate, read_records, zip_members
from data_preprocess.splits import held_out_conversations
from data_preprocess.writers import UNANSWERABLE, OutputFolder, Row

TURNS_URL = "https://zenodo.org/records/5543685 (scai-qrecc21-training-turns.json, scai-qrecc21-test-turns.json)"
PASSAGES_URL = "https://zenodo.org/records/5115890 (passages.zip, 27.5 GB)"


Files = Mapping[str, Source]  # some of the files of NAMES
NAMES = {  # flag -> the file's name in the public releases
    "train": ("scai-qrecc21-training-turns.json",),
    "test": ("scai-qrecc21-test-turns.json",),
    "passages": ("passages.zip",),
}


def find_files(
    place: Path | None, given: Mapping[str, Path | None], without_train: bool, without_collection: bool
) -> Files:
    """The given files; the others by their public names in the folder ``place``.

    Raises:
        ValueError: one is missing that the flags do not leave out; says which, and where to get it.
    """
    left_out = {"train": without_train, "test": False, "passages": without_collection}
    names = {flag: name for flag, name in NAMES.items() if not left_out[flag]}
    files = locate(place, given, names)
    if missing := ", ".join(f"--{flag}" for flag in names if flag not in files):
        raise ValueError(
            f"QReCC lacks {missing}: get the turns from {TURNS_URL} and the passages from {PASSAGES_URL} "
            "(or all by python -m data_preprocess.download qrecc), or pass --without-train or --without-collection"
        )
    return files


@dataclass
class History:
    """What has been said so far in the current conversation of the file."""

    conv_id: int | None = None
    texts: list[str] = field(default_factory=list)

    def before(self, turn: Record, conv_id: int, turn_id: int) -> list[str]:
        """The context of a turn: the turns before it in the file if all are there, else its own NewContext or Context.

        Raises:
            RecordError: neither is complete.
        """
        if conv_id != self.conv_id:
            self.conv_id, self.texts = conv_id, []
        if len(self.texts) != 2 * (turn_id - 1):
            name = next((name for name in ("NewContext", "Context") if name in turn.data), None)
            if name is None:
                problem = "but the turns before it are not all in the file"
                raise turn.error("Turn_no", f"is {turn_id} in conversation {conv_id}, {problem}")
            context = turn.texts(name)
            if len(context) != 2 * (turn_id - 1):
                expected = f"{turn_id - 1} questions and answers before turn {turn_id}"
                raise turn.error(name, f"must have {expected}, got {len(context)} strings")
            self.texts = [text if place % 2 == 0 else text or UNANSWERABLE for place, text in enumerate(context)]
        return list(self.texts)

    def add(self, question: str, answer: str) -> None:
        self.texts += [question, answer or UNANSWERABLE]


def turn_rows(turns: Source, own_split: str, validation: frozenset[str], bad: BadRecords) -> Iterator[Row]:
    """The turns with a gold passage; the others are only in the contexts."""
    history = History()
    for turn in read_records(turns, bad, f"qrecc {own_split}"):
        with bad.tolerate():
            conv_id, turn_id = turn.number("Conversation_no"), turn.number("Turn_no")
            question, answer = turn.text("Question"), turn.text("Truth_answer", blank=True)
            context = history.before(turn, conv_id, turn_id)
            history.add(question, answer)
            golds = list(dict.fromkeys(docid for docid in turn.texts("Truth_passages") if docid))
            if not golds:
                continue
            record: dict[str, Any] = {
                "qid": f"QReCC-{own_split.capitalize()}_{conv_id}_{turn_id}",
                "conv_id": conv_id,
                "turn_id": turn_id,
                "question": question,
                "context": context,
                "answer": answer or UNANSWERABLE,
                "gold_docids": golds,
            }
            optional = {"rewrite": turn.optional_text("Truth_rewrite")}
            optional["source"] = turn.optional_text("Conversation_source")
            record |= {name: value for name, value in optional.items() if value is not None}
            yield Row("validation" if str(conv_id) in validation else own_split, record, turn.where)


def passage_members(archive: Path) -> list[str]:
    """The .jsonl members in the reference's order: those of commoncrawl first, then the others as in the zip file.

    Raises:
        ValueError: there is none.
    """
    members = [name for name in zip_members(archive) if name.endswith(".jsonl")]
    if not members:
        raise ValueError(f"{archive}: has no .jsonl member, so it is not QReCC's passages.zip")
    return sorted(members, key=lambda name: "commoncrawl" not in name)


def passages(archive: Path, bad: BadRecords) -> Iterator[tuple[str, str]]:
    """(id, contents) of every passage; a blank one has contents ""."""
    members = passage_members(archive)
    with tqdm(desc="qrecc collection", unit=" passages", unit_scale=True, mininterval=1.0) as bar:
        for number, member in enumerate(members, start=1):
            bar.set_postfix_str(f"{member} ({number} of {len(members)})")
            for passage in read_records(Source(archive, member), bad):
                bar.update()
                with bad.tolerate():
                    yield passage.docid("id"), passage.text("contents", blank=True)


def convert(files: Files, folder: OutputFolder, held_out: int, seed: int) -> None:
    """Writes what there are files for: train, ``held_out`` validation conversations from it, test, the collection."""
    turns = [files[name] for name in ("train", "test") if name in files]
    splits = ["train", "validation"] if held_out else ["train"]
    if train := files.get("train"):

        def train_rows(bad: BadRecords) -> Iterator[Row]:
            title, is_query = "qrecc conversations", lambda turn: any(turn.texts("Truth_passages"))
            return turn_rows(train, "train", held_out_conversations(train, title, is_query, held_out, seed), bad)

        options = {"validation_conversations": held_out, "seed": seed}
        folder.splits_step("train", splits, [train], options, train_rows, "qrecc")
    if test := files.get("test"):
        folder.splits_step("test", ["test"], [test], {}, partial(turn_rows, test, "test", frozenset()), "qrecc")
    if archive := files.get("passages"):
        written = (splits if train else []) + (["test"] if test else [])
        folder.collection_step([archive, *turns], {}, partial(passages, archive.path), written)
