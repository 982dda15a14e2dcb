"""The analyzer: golden terms by hand, the machine against the regular expression, and both against Lucene itself.

1. Terms are those of Anserini's default English analyzer, token for token, on any Unicode text.
2. The ASCII path, the exact path and the numbers for index building agree.
3. The grammar's machine accepts what Lucene's packed tables accept, over the same classes of characters.
"""

import gzip
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import helpers_lucene
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retriever_server.text import analyzer, word_break
from retriever_server.text.analyzer import STOP_WORDS, TermIds, analyze, words
from retriever_server.text.porter import stem

MTRAG = Path(__file__).resolve().parents[2] / "shared" / "data" / "mtrag" / "corpus.jsonl.gz"


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The dogs are running", ["dog", "run"]),
        ("", []),
        ("as us is it", ["us"]),
        ("don't U.S.A. dog's dog’s DOG'S DOG＇S DOGS'", ["don't", "u.s.a", "dog", "dog", "dog", "dog", "dog"]),
        (
            "1,000 3.14 2;5 1'2 a,b x.5 5.x and/or e-mail foo_bar",
            "1,000 3.14 2;5 1'2 b x 5 5 x e mail foo_bar".split(),  # noqa: SIM905
        ),
        ("a:b 1:2 a_.b __a__ _ __ _1_", ["a:b", "1", "2", "a_", "b", "__a__", "_1_"]),
        ("m² H₂O ½ № 5", ["m", "h", "o", "5"]),
        ("東京 タワー ひら 한국어 ภาษาไทย", ["東", "京", "タワー", "ひ", "ら", "한국어", "ภาษาไทย"]),
        ("タワーa タ_a 1タ", ["タワー", "タ_a", "1", "タ"]),
        ('צה"ל ג\' א"ב"ג a"b', ['צה"ל', "ג'", 'א"ב', "ג", "b"]),
        ("cafe\u0301 naïve Übung", ["cafe\u0301", "naïv", "übung"]),
        (
            "İstanbul ΟΔΟΣ ǅ ẞ 𐐀𐐁",
            ["istanbul", "οδοσ", "ǆ", "ß", "𐐨𐐩"],
        ),  # one letter to one letter: no final sigma, no dotted i
        ("a\u202fb c\u00a0d e\u200df g\u00adh", ["a\u202fb", "c", "d", "e\u200df", "g\u00adh"]),
        (
            "😀 👍🏽 👩\u200d👩\u200d👧 ❤\ufe0f 1\ufe0f\u20e3 🇩🇪🇫🇷 © x™",
            "😀 👍🏽 👩\u200d👩\u200d👧 ❤\ufe0f 1\ufe0f\u20e3 🇩🇪 🇫🇷 © x ™".split(" "),  # noqa: SIM905
        ),
        ("x" * 300, ["x" * 255, "x" * 45]),
        ("é" * 600, ["é" * 255, "é" * 255, "é" * 90]),
        ("a" * 254 + "𐐨b", ["a" * 254, "𐐨b"]),  # 255 UTF-16 units, and no pair is split
        ("\ud800 lone \x00 half\udc00", ["lone", "half"]),
        ("\ud83d\ude00", ["😀"]),  # two halves make one sign, as they do in Java
        ("hello\ud800", []),  # Lucene's reader takes this text for finished before its first word
        ("word " * 60 + "z\udbff", ["word"] * 51),  # or, past its first 255 units, what it had not begun
    ],
)
def test_terms(text: str, terms: list[str]) -> None:
    assert analyze(text) == terms


def test_words_keep_stop_words_and_inner_apostrophes() -> None:
    assert words("The U.S. dog's 1,000 b_c Naïve") == ["the", "u.s", "dog", "1,000", "b_c", "naïve"]


def test_there_are_33_stop_words() -> None:
    assert len(STOP_WORDS) == 33
    assert analyze(" ".join(STOP_WORDS).upper()) == []


@pytest.mark.parametrize(
    ("word", "expected"),
    # Porter's own examples, one or two a rule, and Lucene's endings -bli and -logi
    [pair.split(":") for pair in re.findall(r"\S+",
        "caresses:caress ponies:poni caress:caress cats:cat feed:feed agreed:agre plastered:plaster bled:bled "
        "motoring:motor sing:sing "
        "conflated:conflat troubled:troubl sized:size hopping:hop falling:fall hissing:hiss fizzed:fizz failing:fail "
        "filing:file happy:happi sky:sky "
        "relational:relat conditional:condit rational:ration valenci:valenc digitizer:digit possibly:possibl "
        "radically:radic differently:differ vilely:vile "
        "analogously:analog vietnamization:vietnam predication:predic operator:oper feudalism:feudal "
        "decisiveness:decis formality:formal sensibility:sensibl "
        "apology:apolog triplicate:triplic formative:form electricity:electr hopeful:hope goodness:good "
        "revival:reviv allowance:allow inference:infer "
        "airliner:airlin adjustable:adjust irritant:irrit replacement:replac adjustment:adjust dependent:depend "
        "adoption:adopt onion:onion communism:commun "
        "effective:effect bowdlerize:bowdler probate:probat rate:rate cease:ceas controll:control roll:roll by:by "
        "ies:i u.s:u. yyy:yyi"
    )],
)  # fmt: skip
def test_stems(word: str, expected: str) -> None:
    assert stem(word) == expected


def test_numbers_are_given_in_order_of_first_appearance() -> None:
    ids = TermIds()
    assert ids("dogs, a dog, cats") == [0, 0, 1]
    assert ids("birds\ud800") == []
    assert ids("the birds' cat") == [2, 1]
    assert ids.vocabulary == {"dog": 0, "cat": 1, "bird": 2}
    assert TermIds({"cat": 0})("dog cat") == [1, 0]


def test_the_ascii_path_is_the_exact_one() -> None:
    def exact(text: str) -> list[str]:
        return list(word_break.tokens(text))

    signs = "aZ15_'.:,;\" #*"  # each class of ASCII characters, and two of letters and digits
    for length in range(1, 5):
        for text in map("".join, itertools.product(signs, repeat=length)):
            assert analyzer._ASCII_WORD.findall(text) == exact(text)


CHARACTERS = st.one_of(st.characters(), st.sampled_from("a1_'’.:,; \t\n\x85\u202fאゲ한ก東😀🏽\u200d\ufe0f"))


@given(st.text(CHARACTERS), st.text(CHARACTERS))
def test_every_path_agrees(before: str, after: str) -> None:
    text = f"{before} Running’s {after}"
    terms = analyze(text)
    assert terms == [*analyze(before), "run", *analyze(after)]
    ids = TermIds()
    numbers, names = ids(text), list(ids.vocabulary)
    assert [names[number] for number in numbers] == terms
    assert ids(text) == numbers
    assert terms == [term for token in word_break.tokens(text) if (term := analyzer._term(token)) is not None]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyzer, "MAX_CHUNKS", 3)
    ids = TermIds()
    assert ids("a1 b2 c3 d4 a1 " + "e5-" * 100) == [0, 1, 2, 3, 0, *[4] * 100]
    assert len(ids) <= 3
    assert max(map(len, ids)) <= analyzer.MAX_CHUNK_CHARS


def test_an_empty_or_foreign_text_needs_no_data_of_the_python_version() -> None:
    assert word_break.lower_table()[ord("İ")] == ord("i")
    assert word_break.lower_table()[0x10400] == 0x10428
    assert ord("ß") not in word_break.lower_table()


@pytest.fixture(scope="module")
def oracle() -> None:
    reason = helpers_lucene.why_absent()
    if reason:
        pytest.skip(reason)


@pytest.mark.lucene
@pytest.mark.usefixtures("oracle")
def test_the_machine_is_lucenes() -> None:
    """Walks both machines together over every pair of states they reach: equal answers everywhere mean equal tokens on
    any text."""
    tables = helpers_lucene.automaton()
    steps, final = word_break.machine()
    reached, waiting = {(0, 0)}, [(0, 0)]
    while waiting:
        theirs, ours = waiting.pop()
        token = (
            theirs >= 0 and tables["ATTRIBUTE"][theirs] & 1 and tables["ACTION"][theirs] > 1
        )  # action 1 passes one character over
        assert bool(token) == (ours >= 0 and final[ours])
        for number, letter in enumerate(word_break.CLASSES):
            pair = (
                tables["TRANS"][tables["ROWMAP"][theirs] + number] if theirs >= 0 else -1,
                steps[ours].get(letter, -1) if ours >= 0 else -1,
            )
            if pair not in reached and pair != (-1, -1):
                reached.add(pair)
                waiting.append(pair)
    assert len(reached) > 100


@pytest.mark.lucene
@pytest.mark.slow
@pytest.mark.usefixtures("oracle")
def test_the_data_file_is_lucenes() -> None:
    assert word_break.DATA.read_text(encoding="ascii").splitlines() == list(helpers_lucene.word_break_lines())


def differing(texts: list[str]) -> list[str]:
    """Those texts whose terms are not Lucene's."""
    return [
        text
        for text, expected in zip(texts, helpers_lucene.lucene_terms(texts), strict=True)
        if analyze(text) != expected
    ]


@pytest.mark.lucene
@pytest.mark.usefixtures("oracle")
def test_fuzzed_texts_have_lucenes_terms() -> None:
    assert differing(list(helpers_lucene.fuzzed(2_000, seed=1))) == []


@pytest.mark.lucene
@pytest.mark.slow
@pytest.mark.usefixtures("oracle")
def test_100_000_fuzzed_texts_have_lucenes_terms() -> None:
    assert differing(list(helpers_lucene.fuzzed(100_000, seed=2))) == []


def mtrag_passages() -> Iterator[str]:
    with gzip.open(MTRAG, "rt", encoding="utf-8") as file:
        for record in map(json.loads, file):
            yield f"{record['title']}\n{record['text']}"


@pytest.mark.lucene
@pytest.mark.slow
@pytest.mark.usefixtures("oracle")
@pytest.mark.skipif(not MTRAG.is_file(), reason=f"the MTRAG collection is not there: {MTRAG}")
def test_the_whole_mtrag_collection_has_lucenes_terms() -> None:
    passages = list(mtrag_passages())
    assert len(passages) > 30_000
    assert differing(passages) == []
