"""MTRAG in IBM's repository (github.com/IBM/mt-rag-benchmark).

Below mtrag-human/ (earlier: human/):

    retrieval_tasks/<domain>/<domain>_{lastturn,questions,rewrite}.jsonl   {"_id", "text": "|user|: ..."}
    retrieval_tasks/<domain>/qrels/dev.tsv                                 query-id, corpus-id, score
    generation_tasks/reference.jsonl            {"task_id", "input": [{"speaker", "text"}], "targets"}
    conversations/conversations.json            [{"author", "messages": [{"speaker", "text", "timestamp"}]}]

and corpora/passage_level/<domain>.jsonl.zip with {"_id", "title", "text"}. The retrieval tasks have the user's side
only; the agent's answers are in the generation tasks, or else in the conversations. Query ids are
<conversation><::><turn>, earlier <author>_<time>, which does not name the conversation: author and first question then
identify it.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_preprocess.sources import BadRecords, Record, Source, read_records, read_table, zip_members

REPOSITORY_URL = "https://github.com/IBM/mt-rag-benchmark"
_MARKER = re.compile(r"\s*\|(?:user|agent)\|:\s*")
_BETWEEN_TURNS = re.compile(r"\n(?=\|(?:user|agent)\|:)")
_NEW_QID = re.compile(r"(?P<conversation>.+?)<?::>?(?P<turn>\d+)")


@dataclass(frozen=True, slots=True)
class Task:
    """One query with what was said before it; ``context`` alternates question and answer, "" for an unknown answer."""

    qid: str
    conv_id: str
    turn_id: int
    domain: str
    context: list[str]
    question: str
    answer: str
    rewrite: str | None
    where: str


def without_marker(text: str) -> str:
    """``"|user|: and his wife? "`` -> ``"and his wife?"``."""
    match = _MARKER.match(text)
    return (text[match.end() :] if match else text).strip()


def user_turns(text: str) -> list[str]:
    """The questions of a ``<domain>_questions.jsonl`` text; a question can have several lines."""
    return [without_marker(turn) for turn in _BETWEEN_TURNS.split(text.strip())]


def corpus_passages(sources: Iterable[Source], bad: BadRecords) -> Iterator[tuple[str, str]]:
    """(id, title + " " + text) of corpus files; checks that the ids (366,459 in all corpora) are distinct."""
    seen: set[str] = set()
    for source in sources:
        for passage in read_records(source, bad, f"mtrag collection, {source.path.name}"):
            with bad.tolerate():
                docid = passage.docid("_id")
                if docid in seen:
                    raise passage.error("_id", f"repeats {docid!r}")
                seen.add(docid)
                yield docid, f"{passage.optional_text('title') or ''} {passage.text('text', blank=True)}".strip()


@dataclass(frozen=True, slots=True)
class Repository:
    """The files of a checkout: ``human`` is the folder with retrieval_tasks, ``corpora`` maps domains to files."""

    human: Path
    corpora: dict[str, Source]

    def _task_file(self, domain: str, kind: str) -> Source:
        return Source(self.human / "retrieval_tasks" / domain / f"{domain}_{kind}.jsonl")

    def _dialogue_files(self) -> list[Source]:
        names = "generation_tasks/reference.jsonl", "generation_tasks/RAG.jsonl", "conversations/conversations.json"
        return [Source(self.human / name) for name in names if (self.human / name).is_file()]

    def inputs(self) -> list[Source]:
        kinds = ("lastturn", "questions", "rewrite")
        tasks = [self._task_file(domain, kind) for domain in self.corpora for kind in kinds]
        optional = [source for source in tasks if source.path.is_file()]
        qrels = [_qrels_file(self.human, domain) for domain in self.corpora]
        return [*optional, *qrels, *self._dialogue_files(), *self.corpora.values()]

    def qrels(self, bad: BadRecords) -> dict[str, list[str]]:
        """{query id: relevant passages} of all domains."""
        golds: dict[str, list[str]] = {}
        for domain in self.corpora:
            for row in read_table(_qrels_file(self.human, domain), ("query-id", "corpus-id", "score"), bad):
                with bad.tolerate():
                    if row.number("score") > 0:
                        golds.setdefault(row.text("query-id"), []).append(row.docid("corpus-id"))
        return golds

    def tasks(self, bad: BadRecords) -> Iterator[Task]:
        """All queries, domain after domain."""
        dialogues = read_dialogues(self._dialogue_files(), bad)
        for domain in self.corpora:
            rewrites, questions = (self._optional_lines(domain, kind, bad) for kind in ("rewrite", "questions"))
            for line in read_records(self._task_file(domain, "lastturn"), bad, f"mtrag queries, {domain}"):
                with bad.tolerate():
                    qid = line.text("_id")
                    yield self._task(domain, line, questions.get(qid), rewrites.get(qid), dialogues)

    def _optional_lines(self, domain: str, kind: str, bad: BadRecords) -> dict[str, Record]:
        source, lines = self._task_file(domain, kind), {}
        for line in read_records(source, bad) if source.path.is_file() else ():
            with bad.tolerate():
                lines[line.text("_id")] = line
        return lines

    @staticmethod
    def _task(
        domain: str, line: Record, questions: Record | None, rewrite: Record | None, dialogues: dict[str, list[str]]
    ) -> Task:
        qid, question = line.text("_id"), without_marker(line.text("text"))
        if not question:
            raise line.error("text", "has no question after its marker")
        dialogue = dialogues.get(qid.replace("<::>", "::"))
        if dialogue is not None:
            context, answer = dialogue[:-2], dialogue[-1]
        elif questions is not None:
            earlier = user_turns(questions.text("text"))[:-1]
            context, answer = [text for turn in earlier for text in (turn, "")], ""
        else:
            places = f"neither among {domain}_questions.jsonl nor among the generation tasks"
            raise line.error("_id", f"{qid!r} is {places}")
        match = _NEW_QID.fullmatch(qid)
        conv_id, turn_id = (match["conversation"], int(match["turn"])) if match else ("", len(context) // 2 + 1)
        if not match:
            origin = f"{qid.rpartition('_')[0]}\n{context[0] if context else question}"
            conv_id = hashlib.sha256(origin.encode()).hexdigest()[:16]
        rewritten = without_marker(rewrite.text("text", blank=True)) if rewrite else ""
        return Task(qid, conv_id, turn_id, domain, context, question, answer, rewritten or None, line.where)

    def passages(self, bad: BadRecords) -> Iterator[tuple[str, str]]:
        return corpus_passages(self.corpora.values(), bad)


def _qrels_file(human: Path, domain: str) -> Source:
    return Source(human / "retrieval_tasks" / domain / "qrels" / "dev.tsv")


def read_dialogues(files: list[Source], bad: BadRecords) -> dict[str, list[str]]:
    """{query id with "::": [question 1, answer 1, ..., question, answer]}; the first file that has a query counts."""
    dialogues: dict[str, list[str]] = {}
    for source in files:
        for record in read_records(source, bad):
            with bad.tolerate():
                found = _conversation_dialogues(record) if "messages" in record.data else [_task_dialogue(record)]
                for qid, texts in found:
                    dialogues.setdefault(qid.replace("<::>", "::"), texts)
    return dialogues


def _alternate(messages: list[Record]) -> list[str]:
    """Question, answer, question, ...: what one speaker says in a row is one text."""
    texts: list[str] = []
    for message in messages:
        text, is_user = message.text("text", blank=True), message.text("speaker") == "user"
        if is_user == (len(texts) % 2 == 0):
            texts.append(text)
        elif texts:
            texts[-1] = f"{texts[-1]} {text}"
        else:
            raise message.error("speaker", "must be 'user' in the first message")
    return texts


def _task_dialogue(record: Record) -> tuple[str, list[str]]:
    texts = _alternate(record.objects("input"))
    if len(texts) % 2 == 0:
        raise record.error("input", "must end with the user's question")
    targets = record.objects("targets") if "targets" in record.data else []
    return record.text("task_id"), [*texts, targets[0].text("text", blank=True) if targets else ""]


def _conversation_dialogues(record: Record) -> Iterator[tuple[str, list[str]]]:
    """One dialogue for each user message, under its <author>_<time>."""
    messages = record.objects("messages")
    for place, message in enumerate(messages):
        if message.text("speaker") == "user":
            later = [reply for reply in messages[place + 1 : place + 2] if reply.text("speaker") != "user"]
            answer = later[0].text("text", blank=True) if later else ""
            qid = f"{record.data.get('author')}_{message.data.get('timestamp')}"
            yield qid, [*_alternate(messages[: place + 1]), answer]


def find_repository(folder: Path) -> Repository | None:
    """The repository in ``folder``, or None if there is no retrieval_tasks folder.

    Raises:
        ValueError: it has no domain, or a domain lacks its qrels or corpus.
    """
    places = (folder / name for name in ("mtrag-human", "human", "."))
    human = next((place for place in places if (place / "retrieval_tasks").is_dir()), None)
    if human is None:
        return None
    tasks = human / "retrieval_tasks"
    domains = sorted(path.name for path in tasks.iterdir() if (path / f"{path.name}_lastturn.jsonl").is_file())
    if not domains:
        raise ValueError(f"{tasks}: no folder <domain> with <domain>_lastturn.jsonl in it")
    for domain in domains:
        if not _qrels_file(human, domain).path.is_file():
            raise ValueError(f"{_qrels_file(human, domain)}: no such file")
    return Repository(human, {domain: _corpus(folder, human, domain) for domain in domains})


def _corpus(folder: Path, human: Path, domain: str) -> Source:
    endings = ("jsonl", "jsonl.gz", "jsonl.zip", "json.zip")
    places = folder / "corpora" / "passage_level", human.parent / "corpora" / "passage_level", folder / "corpora"
    paths = (place / f"{domain}.{ending}" for place in places for ending in endings)
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"{places[0] / domain}.jsonl.zip: no such file; get it from {REPOSITORY_URL}")
    if path.suffix != ".zip":
        return Source(path)
    members = [name for name in zip_members(path) if name.endswith((".jsonl", ".json"))]
    members = [name for name in members if not name.startswith("__MACOSX")]
    if len(members) != 1:
        raise ValueError(f"{path}: expected one .jsonl file in it, got {len(members)}")
    return Source(path, members[0])
