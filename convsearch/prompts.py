"""Conversation -> chat messages.

``paper`` is the published zero-shot prompt of ConvSearch-R1 (arXiv 2505.15776, appendix), word for word, because the
released checkpoints expect it. ``compact`` has the same content in fewer tokens, for small models on CPUs. ``rqr`` and
``rqr_think`` are the published prompts of RQR (arXiv 2506.11603). The warm-up prompt begins with one worked example,
ours.
"""

from typing import Literal, get_args

from convsearch.types import Conversation, Message, Turn

PromptStyle = Literal["paper", "compact", "rqr", "rqr_think"]
STYLES = tuple(style for style in get_args(PromptStyle) if not style.startswith("rqr"))  # those for conversations

_PAPER = (
    "Given a query and its context, you must first think about the reasoning process in the mind to decontextualize "
    "the query by resolving coreference and omission issues. Then, provide the user with a rewrite that retains its "
    "original meaning and is as informative as possible to help search engines retrieve relevant documents "
    "effectively. The reasoning process and rewrite should be enclosed within <think> </think> and <rewrite> "
    "</rewrite> tags, respectively, i.e., <think> reasoning process here </think>\n<rewrite> rewrite here "
    "</rewrite>.\n\n### Context Begin ###\n{context}\n### Context End ###\n\nQuery: {query}\nRewrite:"
)
_COMPACT = (
    "Rewrite the last question of this conversation so that a search engine understands it alone. Think first.\n\n"
    "{context}\nQuestion: {query}\n\n"
    "Answer as <think>what the question leaves out</think>\n<rewrite>the full question</rewrite>"
)
_RQR = (
    "Instructions:\n1. Identify the essential problem.\n2. Think step by step to reason and describe what information "
    "could be relevant and helpful to address the questions in detail.\n"
    "3. Draft an answer with as many thoughts as you have.\nQuery: {query}\n\n"
)
_TEMPLATES: dict[str, str] = {"paper": _PAPER, "compact": _COMPACT, "rqr": _RQR, "rqr_think": _RQR}
_RQR_SYSTEM = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)

# The worked example of the warm-up stage, written for this project. It shows both tasks of a rewrite: resolve a
# pronoun, and complete an elliptic question.
EXAMPLE = Conversation(
    qid="worked-example",
    history=(
        Turn("Who designed the Sagrada Familia?", "The architect Antoni Gaudi designed it."),
        Turn("Is it finished?", "No, work on the basilica in Barcelona goes on."),
    ),
    question="How did he die?",
    gold_docids=(),
)
EXAMPLE_OUTPUT = (
    '<think>"he" is Antoni Gaudi, the architect of the Sagrada Familia.</think>\n'
    "<rewrite>How did Antoni Gaudi, architect of the Sagrada Familia, die?</rewrite>"
)


def render(
    conversation: Conversation, style: PromptStyle = "paper", max_turns: int | None = None
) -> tuple[Message, ...]:
    """The zero-shot prompt: one user message, under ``rqr_think`` after a system message.

    Args:
        max_turns: how many of the newest turns of the history are kept; None: all.

    Raises:
        ValueError: the style is unknown.
    """
    if style not in _TEMPLATES:
        raise ValueError(f"prompt style {style!r} is not one of {', '.join(_TEMPLATES)}")
    history = conversation.history
    if max_turns is not None:
        history = history[max(0, len(history) - max_turns) :]
    context = "\n".join(f"Q{i}: {turn.question}\nA{i}: {turn.answer}" for i, turn in enumerate(history, start=1))
    asked = {"role": "user", "content": _TEMPLATES[style].format(context=context, query=conversation.question)}
    return ({"role": "system", "content": _RQR_SYSTEM}, asked) if style == "rqr_think" else (asked,)


def with_worked_example(messages: tuple[Message, ...], style: PromptStyle = "paper") -> tuple[Message, ...]:
    """The warm-up prompt: the worked example as one chat exchange, then ``messages``."""
    return (*render(EXAMPLE, style), {"role": "assistant", "content": EXAMPLE_OUTPUT}, *messages)
