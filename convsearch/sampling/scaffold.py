"""Scaffolded sampling: the project writes the tags and a small model fills them. The paper has nothing like it."""

from dataclasses import dataclass
from typing import Any

from convsearch.parsing import REWRITE_CLOSE, REWRITE_OPEN, THINK_CLOSE, THINK_OPEN


@dataclass(frozen=True, slots=True)
class Scaffold:
    """``literals[i]``, then at most ``budgets[i]`` sampled tokens, then the next literal.

    A part ends before the first token that contains "<" or a line break, or when its budget is used up. No part begins
    with such a token or with white space, so that none is empty.
    """

    literals: tuple[str, ...]
    budgets: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.budgets) < 1:
            raise ValueError(
                f"scaffold: the budgets of thinking and rewrite are {self.budgets} tokens; each must be at least 1"
            )

    @classmethod
    def rewrite_form(cls, think_tokens: int, rewrite_tokens: int) -> "Scaffold":
        return cls((THINK_OPEN, f"{THINK_CLOSE}\n{REWRITE_OPEN}", REWRITE_CLOSE), (think_tokens, rewrite_tokens))


class Script:
    """A scaffold in token ids: the forced tokens, those that end a part, and those that cannot begin one."""

    def __init__(self, tokenizer: Any, scaffold: Scaffold, vocabulary: int, stop_ids: frozenset[int]):
        self.literals = [tokenizer.encode(text, add_special_tokens=False) for text in scaffold.literals]
        self.budgets = scaffold.budgets
        self.max_tokens = sum(map(len, self.literals)) + sum(self.budgets)
        special = stop_ids | set(tokenizer.all_special_ids)
        pieces = tokenizer.batch_decode([[i] for i in range(min(vocabulary, len(tokenizer)))])
        self.ends_part = frozenset(i for i, piece in enumerate(pieces) if "<" in piece or "\n" in piece or i in special)
        self.cannot_start = sorted(self.ends_part | {i for i, piece in enumerate(pieces) if not piece.strip()})
