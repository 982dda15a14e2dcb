"""The files of distillation and inference: conversations in, one line per conversation out, resumable."""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from convsearch import checksums, fingerprints
from convsearch.files import atomic_write, named_errors, read_json, read_jsonl
from convsearch.generation.rewriter import build_rewriter
from convsearch.model.loading import fingerprint, pick_device
from convsearch.model.precision import settled_name
from convsearch.prompts import render, with_worked_example
from convsearch.types import Completion, Conversation

Record = dict[str, Any]

# What the lines of an output depend on: a file is never continued under other settings.
SETTINGS = (  # names of options; distillation has no n
    "model_name_or_path model_name temperature top_p top_k max_tokens repetition_penalty seed prompt_style "
    "max_history_turns scaffold think_tokens rewrite_tokens dtype n"
)


def read_input(path: str, task: str = "rewrite") -> tuple[list[Record], list[Conversation]]:
    """The lines of a conversations file (task "rqr": or of BRIGHT's topics), as they are and as conversations.

    Raises:
        ValueError: a line is not a conversation, or a query id occurs twice; names file and line.
    """
    records, conversations = [], []
    lines: dict[str, int] = {}
    for number, record in read_jsonl(path):
        if task == "rqr" and "qid" not in record:  # a topic {id, query, ...}
            record = {"qid": record.get("id"), "question": record.get("query")}
        try:
            conversation = Conversation.from_record(record)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if conversation.qid in lines:
            first = lines[conversation.qid]
            raise ValueError(f"{path}:{number}: query {conversation.qid!r} is in line {first} already")
        lines[conversation.qid] = number
        records.append(record)
        conversations.append(conversation)
    return records, conversations


REMEDY = "set it back, delete the file, or name another output"
SETTINGS_REMEDY = "delete it together with its output"


class ResumableLines:
    """An output file of JSON lines, one per conversation, under fixed settings.

    Args:
        written: a field that every line of this command has.
        conversations: all of the input.

    Raises:
        ValueError: the file has a query that is not in the input, lines of another command, or other settings, model,
            data or prompts; names both values.
    """

    def __init__(self, path: Path, args: argparse.Namespace, written: str, conversations: Sequence[Conversation]):
        self.path, self.args, self._settings = path, args, checksums.settings_of(path)
        self.done = self._finished(written, {conversation.qid for conversation in conversations})
        self._check_settings()
        self.depends_on(**self._made_of(conversations))

    def _made_of(self, conversations: Sequence[Conversation]) -> dict[str, str]:
        args = self.args
        prompts = [render(one, args.prompt_style, args.max_history_turns) for one in conversations]
        if args.model_name == "Get_SFT":
            prompts = [with_worked_example(prompt, args.prompt_style) for prompt in prompts]
        of = {
            "data": fingerprints.of_files([args.input_path]),
            "prompts": fingerprints.of_texts(message["content"] for prompt in prompts for message in prompt),
        }
        if getattr(args, "k", 1):
            of["model"] = fingerprint(args.model_name_or_path)
        return of

    def _finished(self, written: str, qids: set[str]) -> dict[str, Record]:
        """The lines of an earlier run, by query id; cuts off a half-written last line."""
        path, done = self.path, dict[str, Record]()
        if not path.is_file():
            return done
        checksums.check_lines(path)
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                remedy = "delete the line, or name another output"
                raise ValueError(f"{where}: not a line of JSON ({error}); {remedy}") from error
            if not isinstance(record, dict) or "qid" not in record or written not in record:
                raise ValueError(f"{where}: not a line that this command writes; name another output")
            if record["qid"] not in qids:
                foreign = f"query {record['qid']!r} is not in the input; the file belongs to other data"
                raise ValueError(f"{where}: {foreign}: name another output")
            done[record["qid"]] = record
        return done

    def _check_settings(self) -> None:
        """Writes the settings beside a new output; compares them if lines are there."""
        now = {name: vars(self.args)[name] for name in SETTINGS.split() if name in vars(self.args)}
        now["dtype"] = settled_name(self.args.dtype, pick_device(self.args.device))
        if self.done and self._settings.is_file():
            before = {"repetition_penalty": 1.0, "n": 1, **read_json(self._settings, SETTINGS_REMEDY)}
            for name, value in now.items():
                if before.get(name) != value:
                    differ = f"was sampled with --{name} {before.get(name)}, now it is {value}"
                    raise ValueError(f"{self.path} {differ}: {REMEDY}")
            return
        with atomic_write(self._settings) as file:
            json.dump(now, file, indent=1)

    def depends_on(self, **made_of: str) -> None:
        """Compares the fingerprints with those of the lines that are there, and keeps them beside the output.

        Raises:
            ValueError: something has another content now; names both.
        """
        settings = read_json(self._settings, SETTINGS_REMEDY)
        before = settings.get("made_of", {})
        fingerprints.check(self.path, before, made_of, REMEDY)
        if made_of.keys() - before.keys():
            with atomic_write(self._settings) as file:
                json.dump(settings | {"made_of": {**before, **made_of}}, file, indent=1)

    def complete(
        self,
        conversations: Sequence[Conversation],
        n: int,
        prompts_per_slice: int,
        lines: Callable[[Sequence[Conversation], list[list[Completion]]], Iterable[Record]],
        description: str,
    ) -> None:
        """Samples n completions of each conversation without a line, and appends their lines, slice by slice.

        Args:
            lines: conversations and their completions -> the lines to write.
        """
        rest = [conversation for conversation in conversations if conversation.qid not in self.done]
        kept = len(conversations) - len(rest)
        if self.done:
            print(f"{self.path}: {kept} of {len(conversations)} lines are there already and are kept")
        if not rest:
            return
        size = prompts_per_slice
        if n:
            slices = build_rewriter(self.args).slices(rest, n, self.args.seed, size)
        else:
            slices = ((rest[i : i + size], [[] for _ in rest[i : i + size]]) for i in range(0, len(rest), size))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (
            named_errors(self.path),
            self.path.open("a", encoding="utf-8") as file,
            tqdm(total=len(conversations), initial=kept, desc=description, unit="question") as bar,
        ):
            for part, groups in slices:
                for record in lines(part, groups):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(part))
        settings = read_json(self._settings, SETTINGS_REMEDY)
        with atomic_write(self._settings) as file:
            json.dump(settings | {"written": checksums.written(self.path)}, file, indent=1)
