"""Lucene's own analyzer and search, for the parity tests.

``python tests/helpers_lucene.py`` writes retriever_server/word_break.txt anew from the tables in Lucene's jar.
"""

import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(
    str(ROOT / ".venv" / "lucene")
)  # where scripts/test.sh puts the extra; behind the environment's own packages
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from retriever_server import lucene  # noqa: E402
from retriever_server.text import word_break  # noqa: E402

TOKENIZER = "org.apache.lucene.analysis.standard.StandardTokenizerImpl"


def why_absent() -> str | None:
    """Why Lucene cannot be used here; None where it can."""
    try:
        lucene.java("java.lang.String")
    except ValueError as error:
        return str(error)
    return None


def lucene_terms(texts: Iterable[str], size: int = 2000) -> Iterator[list[str]]:
    """Each text's terms by Anserini's default analyzer; they come back as JSON, ``size`` texts at a time."""
    mapper = lucene.java("com.fasterxml.jackson.databind.ObjectMapper")()
    utils, lists = lucene.java("io.anserini.analysis.AnalyzerUtils"), lucene.java("java.util.ArrayList")
    analyzer = lucene.java("io.anserini.analysis.DefaultEnglishAnalyzer").newDefaultInstance()
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, size)):
        answers = lists()
        for text in batch:
            answers.add(utils.analyze(analyzer, lucene.java_string(text)))
        yield from json.loads(mapper.writeValueAsString(answers))


_SUFFIXES = re.findall(
    r"\w+",
    "s ies sses ss eed ed ing at bl iz y ational tional enci anci izer bli abli alli entli eli ousli ization ation "
    "ator alism iveness fulness ousness aliti "
    "iviti biliti logi icate ative alize iciti ical ful ness al ance ence er ic able ible ant ement ment ent sion "
    "tion ion ou ism ate iti ous ive ize e ll le",
)
_EMOJI = re.findall(
    r"\S+",
    "👍 👩 ❤ 🏽 🏿 \u200d \ufe0f \ufe0e \u20e3 # * 1 🇩 🇪 🇫 © ™ ℹ Ⓜ 〰 〽 🏴 \U000e0067 \U000e0062 \U000e007f 🤷 ♂ 𝟗 ☝",
)


def _alphabets() -> list[list[str]]:
    """Sets of characters that texts are drawn from: each class of the word breaker, and what is apt to go wrong
    together."""
    rows = [line.split() for line in word_break.DATA.read_text().splitlines() if line.startswith("class ")]
    by_class: dict[str, list[str]] = {}
    for _, first, last, letter in rows:
        start, end = int(first, 16), int(last, 16)
        by_class.setdefault(letter, []).extend(map(chr, {start, end, (start + end) // 2, min(start + 1, end)}))
    together = (
        "A9'.:,_",
        "A9N_.,' ",
        "HQ'A.:_",
        "KRC_xA",
        "GAxz'.",
        "Ttx A",
        "PMLzVvkx#9Ise",
        "A_xz9",
        "ANH'Q.:,_xzKGL ",
    )
    mixes = [[sign for letter in letters for sign in by_class.get(letter, [" "])] for letters in together]
    cased = [chr(code) for code in word_break.lower_table()]
    return [
        *by_class.values(),
        *mixes,
        _EMOJI,
        cased,
        list("aeiouybcs'’＇sS.-_ 12,;:\u202f\u00a0\u0085\t\n\x1c"),
        list("ab \ud800\udbff\udc00\udfff😀"),
    ]


def fuzzed(count: int, seed: int) -> Iterator[str]:
    """Texts of all planes: characters at random, mixtures within and between the word breaker's classes, emoji
    sequences, words with Porter's suffixes, words beyond 255 units, surrogates alone and at the end."""
    random = Random(seed)
    alphabets = _alphabets()
    for _ in range(count):
        kind = random.random()
        length = random.choice((1, 2, 3, 5, 8, 13, 21, 34))
        if kind < 0.1:
            yield "".join(chr(random.randrange(sys.maxunicode + 1)) for _ in range(length))
        elif kind < 0.7:
            mix = random.choices(alphabets, k=random.choice((1, 1, 2, 3)))
            yield "".join(random.choice(random.choice(mix)) for _ in range(length))
        elif kind < 0.95:
            stems = ("".join(random.choices("aeiouyybcdlmnrstvwxz", k=random.randrange(7))) for _ in range(length))
            yield " ".join(stem + "".join(random.choices(_SUFFIXES, k=random.choice((1, 1, 2)))) for stem in stems)
        else:
            mix = random.choices(alphabets, k=2)
            unit = "".join(random.choice(random.choice(mix)) for _ in range(random.choice((1, 2, 5, 300))))
            text = unit * (random.randrange(250, 700) // max(1, len(unit)) + 1)
            yield text + random.choice(("", "", "\ud800", "\udc00", "😀", "a\udbff"))


def lucene_index(
    passages: Iterable[tuple[str, str]], folder: Path, k1: float = 0.9, b: float = 0.4
) -> lucene.LuceneIndex:
    """A Lucene index, in ``folder``/lucene, of (docid, text) pairs; the passages keep their order."""
    from convsearch.files import write_jsonl

    write_jsonl(folder / "collection.jsonl", ({"id": docid, "contents": text} for docid, text in passages))
    lucene.build(folder / "collection.jsonl", folder / "lucene")
    return lucene.LuceneIndex(folder / "lucene", k1, b)


def lucene_ranks(
    index: lucene.LuceneIndex, queries: Sequence[str], golds: Sequence[Sequence[str]], depth: int
) -> list[int | None]:
    """The place of each query's first gold among Lucene's best ``depth``; None where none is there."""
    return index.gold_ranks(queries, golds, depth)


def automaton() -> dict[str, list[int]]:
    """The packed tables of Lucene's word breaker, unpacked by itself and read by reflection."""
    import jnius

    class Field(jnius.JavaClass, metaclass=jnius.MetaJavaClass):  # pyjnius's own, whose place it takes, has no get
        __javaclass__ = "java/lang/reflect/Field"
        getName = jnius.JavaMethod("()Ljava/lang/String;")
        getType = jnius.JavaMethod("()Ljava/lang/Class;")
        getModifiers = jnius.JavaMethod("()I")
        get = jnius.JavaMethod("(Ljava/lang/Object;)Ljava/lang/Object;")
        setAccessible = jnius.JavaMethod("(Z)V")

    tokenizer, tables = lucene.java("java.lang.Class").forName(TOKENIZER), {}
    for name in ("CMAP_TOP", "CMAP_BLOCKS", "ROWMAP", "TRANS", "ACTION", "ATTRIBUTE"):
        field = jnius.cast("java.lang.reflect.Field", tokenizer.getDeclaredField(f"ZZ_{name}"))
        field.setAccessible(True)
        tables[name] = list(field.get(None))
    return tables


def character_classes(tables: dict[str, list[int]]) -> list[int]:
    """The number of each code point's class."""
    return [tables["CMAP_BLOCKS"][tables["CMAP_TOP"][code >> 8] | code & 255] for code in range(sys.maxunicode + 1)]


def word_break_lines() -> Iterator[str]:
    """The lines of word_break.txt."""
    version = lucene.java("org.apache.lucene.util.Version").LATEST.toString()
    runtime = lucene.java("java.lang.System").getProperty("java.version")
    source = f"Lucene {version} and Java {runtime}"
    yield f"# Written by `python tests/helpers_lucene.py` from {source}: facts of the Unicode character database."
    letters = "the letters are those of word_break.py; characters that are not listed stand in no word."
    yield f"# class FIRST LAST LETTER: {letters}"
    first = 0
    for number, run in itertools.groupby(character_classes(automaton())):
        last = first + len(list(run)) - 1
        if number:
            yield f"class {first:04X} {last:04X} {word_break.CLASSES[number]}"
        first = last + 1
    yield "# lower FIRST LAST STEP SHIFT: every STEPth code point becomes itself + SHIFT."
    lower = lucene.java("java.lang.Character").toLowerCase
    shifts = {
        code: shift
        for code in range(sys.maxunicode + 1)
        if not 0xD800 <= code < 0xE000 and (shift := int(lower(code)) - code)
    }
    yield from (f"lower {first:04X} {last:04X} {step} {shift}" for first, last, step, shift in runs(shifts))


def runs(shifts: dict[int, int]) -> list[tuple[int, int, int, int]]:
    """(first, last, step 1 or 2, shift) of runs of one shift."""
    found: list[tuple[int, int, int, int]] = []
    for code, shift in shifts.items():
        if found:
            first, last, step, same = found[-1]
            gap = code - last
            if shift == same and gap <= 2 and (gap == step or first == last):
                found[-1] = (first, code, gap, shift)
                continue
        found.append((code, code, 1, shift))
    return found


if __name__ == "__main__":
    from convsearch.files import atomic_write

    with atomic_write(word_break.DATA) as file:
        file.writelines(f"{line}\n" for line in word_break_lines())
