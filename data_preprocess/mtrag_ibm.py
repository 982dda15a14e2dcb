"""MTRAG as IBM keeps it (github.com/IBM/mt-rag-benchmark).

Below mtrag-human/ (earlier: human/):

    retrieval_tasks/<domain>/<domain>_{lastturn,questions,rewrite}.jsonl   {"_id", "text": "|user|: ..."}
    retrieval_tasks/<domain>/qrels/dev.tsv                                 query-id, corpus-id, score
    generation_tasks/reference.jsonl                                       {"task_id", "input": [{"speaker", "text"}], "targets"}
    conversations/conversations.json                                       [{"author", "messages": [{"speaker", "text", "timestamp"}]}]

and corpora/passage_level/<domain>.jsonl.zip with {"_id", "title", "text"}. The retrieval tasks hold the user's side only; the agent's
answers come from the generation tasks, or else the conversations. Query ids are <conversation><::><turn>, earlier <author>_<time>, which
does not name the conversation: then it is told by its author and first question.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_preprocess.sources import BadRecords, Record, RecordError, Source, read_records, read_table, zip_members

REPOSITORY_URL = "https://github.com/IBM/mt-rag-benchmark"
_MARKER = re.compile(r"\s*\|(?:user|agent)\|:\s*")
_BETWEEN_TURNS = re.compile(r"\n(?=\|(?:user|agent)\|:)")
_NEW_QID = re.compile(r"(?P<conversation>.+?)<?::>?(?P<turn>\d+)")


@dataclass(frozen=True, slots=True)
class Task:
    """One query with what was said before it; ``context`` alternates question and answer, where an unknown answer is ""."""

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
    """The questions of a ``<domain>_questions.jsonl`` text; a question may itself have several lines."""
    return [without_marker(turn) for turn in _BETWEEN_TURNS.split(text.strip())]


def corpus_passages(sources: Iterable[Source], bad: BadRecords) -> Iterator[tuple[str, str]]:
    """(id, title + " " + text) of corpus files; ids, 366,459 in all corpora together, are checked to be distinct."""
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
    domains: list[str]
    corpora: dict[str, Source]

    def _task_file(self, domain: str, kind: str) -> Source:
        return Source(self.human / "retrieval_tasks" / domain / f"{domain}_{kind}.jsonl")

    def _qrels_file(self, domain: str) -> Source:
        return Source(self.human / "retrieval_tasks" / domain / "qrels" / "dev.tsv")

    def _dialogue_files(self) -> list[Source]:
        candidates = [
            "generation_tasks/reference.jsonl",
            "generation_tasks/RAG.jsonl",
            "conversations/conversations.json",
        ]
        return [Source(self.human / name) for name in candidates if (self.human / name).is_file()]

    def inputs(self) -> list[Source]:
        tasks = [
            self._task_file(domain, kind) for domain in self.domains for kind in ("lastturn", "questions", "rewrite")
        ]
        optional = [source for source in tasks if source.path.is_file()]
        return [*optional, *map(self._qrels_file, self.domains), *self._dialogue_files(), *self.corpora.values()]

    def qrels(self, bad: BadRecords) -> dict[str, list[str]]:
        """{query id: relevant passages} of all domains."""
        golds: dict[str, list[str]] = {}
        for domain in self.domains:
            for row in read_table(self._qrels_file(domain), ("query-id", "corpus-id", "score"), bad):
                with bad.tolerate():
                    if row.number("score") > 0:
                        golds.setdefault(row.text("query-id"), []).append(row.docid("corpus-id"))
        return golds

    def tasks(self, bad: BadRecords) -> Iterator[Task]:
        """All queries, domain after domain."""
        dialogues = read_dialogues(self._dialogue_files(), bad)
        for domain in self.domains:
            rewrites = {line.text("_id"): line for line in self._optional_lines(domain, "rewrite", bad)}
            questions = {line.text("_id"): line for line in self._optional_lines(domain, "questions", bad)}
            for line in read_records(self._task_file(domain, "lastturn"), bad, f"mtrag queries, {domain}"):
                with bad.tolerate():
                    yield self._task(
                        domain, line, questions.get(line.text("_id")), rewrites.get(line.text("_id")), dialogues
                    )

    def _optional_lines(self, domain: str, kind: str, bad: BadRecords) -> Iterator[Record]:
        source = self._task_file(domain, kind)
        if source.path.is_file():
            for line in read_records(source, bad):
                with bad.tolerate():
                    line.text("_id")
                    yield line

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
            context, answer = (
                [text for earlier in user_turns(questions.text("text"))[:-1] for text in (earlier, "")],
                "",
            )
        else:
            raise RecordError(
                f"{line.where}: field '_id' {qid!r} is neither among {domain}_questions.jsonl nor among the generation tasks"
            )
        match = _NEW_QID.fullmatch(qid)
        first = context[0] if context else question
        conv_id = (
            match["conversation"]
            if match
            else hashlib.sha256(f"{qid.rpartition('_')[0]}\n{first}".encode()).hexdigest()[:16]
        )
        rewritten = without_marker(rewrite.text("text", blank=True)) if rewrite else ""
        turn_id = int(match["turn"]) if match else len(context) // 2 + 1
        return Task(qid, conv_id, turn_id, domain, context, question, answer, rewritten or None, line.where)

    def passages(self, bad: BadRecords) -> Iterator[tuple[str, str]]:
        return corpus_passages(self.corpora.values(), bad)


def read_dialogues(files: list[Source], bad: BadRecords) -> dict[str, list[str]]:
    """{query id with "::": [question 1, answer 1, ..., question, answer]} of generation tasks and conversations; the first file wins."""
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
            answers = [
                later.text("text", blank=True)
                for later in messages[place + 1 : place + 2]
                if later.text("speaker") != "user"
            ]
            yield (
                f"{record.data.get('author')}_{message.data.get('timestamp')}",
                [*_alternate(messages[: place + 1]), *(answers or [""])],
            )


def find_repository(folder: Path) -> Repository | None:
    """The repository in ``folder``, or None where there is no retrieval_tasks folder.

    Raises:
        ValueError: it has no domain, or a domain lacks its qrels or corpus.
    """
    human = next(
        (folder / name for name in ("mtrag-human", "human", ".") if (folder / name / "retrieval_tasks").is_dir()), None
    )
    if human is None:
        return None
    domains = sorted(
        path.name for path in (human / "retrieval_tasks").iterdir() if (path / f"{path.name}_lastturn.jsonl").is_file()
    )
    if not domains:
        raise ValueError(f"{human / 'retrieval_tasks'}: no folder <domain> with <domain>_lastturn.jsonl in it")
    corpora: dict[str, Source] = {}
    for domain in domains:
        if not (human / "retrieval_tasks" / domain / "qrels" / "dev.tsv").is_file():
            raise ValueError(f"{human / 'retrieval_tasks' / domain / 'qrels' / 'dev.tsv'}: no such file")
        corpora[domain] = _corpus(folder, human, domain)
    return Repository(human, domains, corpora)


def _corpus(folder: Path, human: Path, domain: str) -> Source:
    for place in (folder / "corpora" / "passage_level", human.parent / "corpora" / "passage_level", folder / "corpora"):
        for name in (f"{domain}.jsonl", f"{domain}.jsonl.gz", f"{domain}.jsonl.zip", f"{domain}.json.zip"):
            path = place / name
            if not path.is_file():
                continue
            if path.suffix != ".zip":
                return Source(path)
            members = [
                member
                for member in zip_members(path)
                if member.endswith((".jsonl", ".json")) and not member.startswith("__MACOSX")
            ]
            if len(members) != 1:
                raise ValueError(f"{path}: expected one .jsonl file in it, got {len(members)}")
            return Source(path, members[0])
    raise ValueError(
        f"{folder / 'corpora' / 'passage_level' / domain}.jsonl.zip: no such file; get it from {REPOSITORY_URL}"
    )
