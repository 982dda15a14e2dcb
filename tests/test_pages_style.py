"""The colours of the pages: each named once, and every pair that is used has WCAG AA's contrast (4.5 for text, 3 for
lines and areas)."""

import re
from pathlib import Path

import pytest
from helpers_pages import ROOT, contrast

SHEETS = [
    path for package in ("convsearch", "eval", "retriever_server") for path in sorted((ROOT / package).rglob("*.css"))
]
SHARED = ROOT / "convsearch" / "pages.css"
SURFACES = ("page", "panel", "inset")
RULE = re.compile(r"([^{}]+)\{([^{}]*)\}")
VARIABLE = r"var\(--([\w-]+)\)"


def palettes() -> dict[str, dict[str, str]]:
    """The colours by name, light and dark."""
    blocks = re.findall(r":root \{([^}]*)\}", SHARED.read_text(encoding="utf-8"))
    assert len(blocks) == 2
    return {
        scheme: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for scheme, block in zip(("light", "dark"), blocks, strict=True)
    }


def pairs() -> set[tuple[str, str]]:
    """(ink, ground) of every rule: those that stand together, and an ink alone on each surface it may stand on."""
    found = {("text", surface) for surface in SURFACES}
    for sheet in SHEETS:
        for _, body in RULE.findall(sheet.read_text(encoding="utf-8")):
            inks = re.findall(rf"(?<![\w-])color: {VARIABLE}", body)
            grounds = re.findall(rf"(?<![\w-])background: {VARIABLE}", body)
            found |= {(ink, ground) for ink in inks for ground in grounds or SURFACES}
            found |= {("text", ground) for ground in grounds if not inks and not ground.startswith(("rank-", "graph-"))}
    return found


def test_contrast_by_hand() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=0.001)  # the classic that just fails


def test_both_schemes_name_the_same_colours() -> None:
    light, dark = palettes().values()
    assert light.keys() == dark.keys()
    assert len(light) > 15


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.name)
def test_colours_are_named_in_the_palette_alone(sheet: Path) -> None:
    rules = re.sub(r":root \{[^}]*\}", "", sheet.read_text(encoding="utf-8"))
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b|rgba?\(|hsla?\(", rules) == []
    assert set(re.findall(VARIABLE, rules)) <= palettes()["light"].keys()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_pair_of_ink_and_ground_is_readable(scheme: str) -> None:
    colours = palettes()[scheme]
    ratios = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs()}
    assert len(ratios) > 15
    assert {pair: round(ratio, 2) for pair, ratio in ratios.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_and_areas_stand_out(scheme: str) -> None:
    colours = palettes()[scheme]
    drawn = [name for name in colours if name.startswith(("graph-", "rank-"))]
    assert {
        name: contrast(colours[name], colours["panel"])
        for name in drawn
        if contrast(colours[name], colours["panel"]) < 3
    } == {}
