"""Captions under validation images can be read in any language, whatever fonts the machine has."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from training_utils.run import fonts, grids

CAPTIONS = {
    "naïve façade": "naive facade",
    "cafe\u0301 crème": "cafe creme",
    "Łódź, Ærøskøbing, straße — 5 €": "Lodz, AEroskobing, strasse - 5 EUR",
    "猫": "\\u732b",
    "a 猫 cat": "a \\u732b cat",
    "кот": "\\u043a\\u043e\\u0442",
    "قطة": "\\u0642\\u0637\\u0629",
    "हिन्दी": "\\u0939\\u093f\\u0928\\u094d\\u0926\\u0940",
    "❤️ 🐱": "\\u2764 \\U0001f431",
    "👨‍👩": "\\U0001f468\\U0001f469",
    "½ №": "1⁄2 No",
    "“plain” ‘quotes’…": "“plain” ‘quotes’…",
    "nul\x00 \ud800": "nul\\x00 \\ud800",
    "plain": "plain",
    "": "",
}


@pytest.fixture
def without_system_fonts(monkeypatch):
    monkeypatch.setattr(fonts, "_system_fonts", lambda size, letters: [])


def is_box(font, letter):
    """Whether a letter is drawn as one that no font has."""
    probe = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
    return bytes(probe.getmask(letter)) == bytes(probe.getmask("\uffff"))


@pytest.mark.parametrize("caption", CAPTIONS)
def test_without_fonts_nothing_is_a_box(caption, without_system_fonts):
    text, font = fonts.drawable(caption, 14)
    assert text == CAPTIONS[caption] and font.getname() == ("Aileron", "Regular")
    assert not any(is_box(font, letter) for letter in text if not letter.isspace())


@pytest.mark.parametrize("caption", CAPTIONS)
def test_with_the_fonts_of_this_machine_nothing_is_a_box(caption):
    text, font = fonts.drawable(caption, 14)
    assert not any(is_box(font, letter) for letter in text if not letter.isspace())


def test_a_font_of_the_system_draws_what_it_has():
    try:
        ImageFont.truetype("DejaVuSans.ttf", 14)
    except OSError:
        pytest.skip("there is no DejaVu Sans")
    for caption in ("naïve façade", "кошка на окне", "Ελληνικά", "Łódź — 5 €", "cafe\u0301"):
        text, font = fonts.drawable(caption, 14)
        assert text == fonts.unicodedata.normalize("NFC", caption) and font.getname()[0] != "Aileron"


def test_pillows_own_font_is_taken_where_it_can_be(monkeypatch):
    """The grids of plain captions are what they were, and no font is looked for."""
    monkeypatch.setattr(fonts, "_system_fonts", None)
    assert fonts.drawable("a red bicycle “at night”", 14)[1] is fonts.builtin(14)


@pytest.mark.parametrize("problem", [None, OSError(), fonts.subprocess.TimeoutExpired("fc-match", 10)])
def test_a_machine_without_fontconfig_has_what_pillow_finds(problem, monkeypatch):
    def fail(*_, **__):
        raise problem

    monkeypatch.setattr(fonts.shutil, "which", lambda name: problem and "/usr/bin/fc-match")
    monkeypatch.setattr(fonts.subprocess, "run", fail)
    assert fonts._files_with("猫") == []


def test_captions_without_spaces_take_three_lines(without_system_fonts):
    """And those of ASCII are cut as they were."""
    draw = grids.ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text, font = fonts.drawable("кошка" * 20, 14)
    lines = grids._fit(draw, text, font, 256, breaks_words=True).splitlines()
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(draw.textlength(line, font=font) <= 256 for line in lines)
    assert "".join(lines[:2]) == text[: len("".join(lines[:2]))]
    (line,) = grids._fit(draw, "x" * 100, font, 256).splitlines()
    assert line.endswith("…")


def test_a_grid_in_many_languages_is_drawn():
    images = [Image.new("RGB", (16, 16), "white")] * len(CAPTIONS)
    sheet = grids.draw_grid(images, list(CAPTIONS), "after 1 step")
    assert sheet.width == 4 * 268 + 12 and sheet.height > 4 * 256
    below_first = np.asarray(sheet)[40 + 6 + 256 : 40 + 6 + 256 + 24, 12:268]
    assert below_first.min() < 150  # its caption
