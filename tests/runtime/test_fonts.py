"""Letters beyond Latin on the contact sheet: found where a font has them, and named where none has."""

import shutil

import numpy as np
import pytest
from fontfile import make_font
from PIL import Image, ImageDraw
from test_run import short

from migician.runtime import fonts
from migician.runtime.errors import MigicianError
from migician.runtime.fonts import Lettering, advice, clean, undrawable

CHINESE = "第二张图片里红色的杯子在哪里"
NOWHERE = "\ue123\U000f1234"  # for private use: in no font but those made here


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test looks for fonts anew, and leaves nothing found to the next."""

    def forget():
        for cached in (fonts._find_other, fonts._ask_fontconfig, fonts._search_folders, fonts._installed):
            cached.cache_clear()
        fonts._used.clear()
        fonts._first.clear()

    monkeypatch.delenv("MIGICIAN_FONT", raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def alone(monkeypatch):
    """No fontconfig, and no folder with fonts."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(fonts, "_FOLDERS", ())


def drawn(text, size=24):
    """The ink of a line: bool[H, W]."""
    lettering = Lettering(size)
    page = Image.new("L", (round(lettering.length(text)) + 4, 2 * size), 255)
    lettering.write(ImageDraw.Draw(page), (2, lettering.ascent), text, "black")
    return np.asarray(page) < 128


def is_box(text):
    """Whether a letter comes out as Pillow's own font draws what it lacks."""
    return np.array_equal(drawn(text), drawn("\U0010ffff"))


def test_latin_needs_no_other_font(alone):
    assert undrawable("Where is the cup? 100% (a) [b] {c} ~ 'd' \"e\"") == ""
    assert fonts._runs("the cup") == [(fonts._OWN, "the cup")]
    assert not fonts._used


def test_what_no_font_has_is_named(alone):
    assert undrawable("the 杯子 and the 杯 of 2") == "杯子"
    assert is_box("杯")
    line = advice(undrawable(CHINESE + "한국어"))
    assert "fonts-noto-cjk" in line and "MIGICIAN_FONT" in line and "\n" not in line and len(line) < 200
    assert "fonts-noto-core" in advice("ह") and "fonts-noto-cjk" not in advice("ह")
    assert "fonts-symbola" in advice("\U0001f600")
    assert "fonts-noto-cjk fonts-noto-core" in advice("杯ह")


def test_the_font_that_is_named_in_the_environment(alone, monkeypatch, tmp_path):
    monkeypatch.setenv("MIGICIAN_FONT", str(make_font(tmp_path / "block.ttf", "杯子" + NOWHERE)))
    assert undrawable("the 杯子在" + NOWHERE) == "在"
    ink = drawn("杯")
    rows, columns = np.nonzero(ink)
    assert ink.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1) >= 18**2  # the block that the font draws for it
    assert is_box("在") and not is_box("杯")
    assert [piece for _, piece in fonts._runs("a cup 杯子 b")] == ["a cup ", "杯子", " b"]
    assert Lettering(20).length("杯子") == pytest.approx(40, abs=1)


@pytest.mark.parametrize("content", [None, b"", b"not a font" * 50])
def test_a_font_that_is_none_is_one_line(alone, monkeypatch, tmp_path, content):
    path = tmp_path / "font.ttf"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("MIGICIAN_FONT", str(path))
    with pytest.raises(MigicianError, match=r"^MIGICIAN_FONT=.*font\.ttf: no font") as caught:
        undrawable("杯")
    assert "\n" not in str(caught.value)


def test_folders_are_searched_where_there_is_no_fontconfig(alone, monkeypatch, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    make_font(tmp_path / "other.ttf", "abc")
    make_font(tmp_path / "deep" / "er" / "block.ttf", "杯子" + NOWHERE)
    (tmp_path / "broken.otf").write_bytes(b"junk")
    (tmp_path / "loop").symlink_to(tmp_path)
    monkeypatch.setattr(fonts, "_FOLDERS", (str(tmp_path), str(tmp_path / "none")))
    assert undrawable("杯子在" + NOWHERE) == "在" and not is_box("杯")


@pytest.mark.skipif(shutil.which("fc-match") is None, reason="fontconfig is not installed")
def test_fontconfig_is_asked(monkeypatch, tmp_path):
    (tmp_path / "fonts").mkdir()
    make_font(tmp_path / "fonts" / "block.ttf", "杯子" + NOWHERE)
    where = f"<dir>{tmp_path}/fonts</dir><cachedir>{tmp_path}/cache</cachedir>"
    config = tmp_path / "fonts.conf"
    config.write_text(f'<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>{where}</fontconfig>')
    monkeypatch.setenv("FONTCONFIG_FILE", str(config))
    assert undrawable("杯子在" + NOWHERE) == "在" and not is_box("子")
    assert fonts._ask_fontconfig.cache_info().currsize <= 4  # not once for each letter


def test_many_missing_letters_ask_fontconfig_a_few_times(monkeypatch):
    asked = []

    def answer(command, **_):
        asked.append(command)
        return fonts.subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(fonts.subprocess, "run", answer)
    letters = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 500))
    assert undrawable(letters) == letters and len(asked) <= fonts._MOST_QUESTIONS + 1
    assert all("lang=zh-cn" in command[-1] for command in asked)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("accented Latin", "Où est la tasse naïve? Größe, žluťoučký, €"),
        ("Chinese", CHINESE + "，。？“”"),
        ("traditional Chinese", "紅色的杯子在哪裡"),
        ("Japanese", "カップはどこですか、二枚目の画像"),
        ("Korean", "두 번째 사진의 컵"),
        ("Cyrillic", "Где чашка?"),
        ("Greek", "Πού είναι το φλιτζάνι;"),
        ("Arabic", "أين الكوب؟"),
        ("Hebrew", "איפה הכוס?"),
        ("Thai", "ถ้วยอยู่ที่ไหน"),
        ("Hindi", "कप कहाँ है"),
    ],
)
def test_each_script_with_the_fonts_of_this_machine(name, text):
    lost = undrawable(text)
    if lost:
        assert all(is_box(letter) for letter in lost if letter.isalpha())
        pytest.skip(f"no font on this machine has {name}; {advice(lost)}")
    letters = [letter for letter in dict.fromkeys(clean(text)) if letter.isalpha()]
    pictures = {drawn(letter).tobytes() for letter in letters}
    assert len(pictures) > 0.8 * len(letters)  # each another one, and none of them the box for what is missing
    assert not any(is_box(letter) for letter in letters) and drawn(text).any()


def test_the_forms_of_chinese_characters_follow_the_text():
    assert fonts._language("杯子") == "zh-cn" and fonts._language("the cup") == "zh-cn"
    assert fonts._language("杯子はどこ") == "ja" and fonts._language("컵 杯") == "ko"


def test_text_is_cleaned():
    assert clean(" a\n\tb\r\n c\x00d\x1b[31m ") == "a b c d [31m"
    assert clean("\u202eabc\u200f\ufeff") == "abc" and clean("") == "" and clean("\n") == ""
    assert clean("e\u0301") == "é" and clean("\ud800") == "?"
    assert list(fonts._clusters("a\u0301bc\ufe0f")) == ["a\u0301", "b", "c"]
    assert "\u200d" not in "".join(fonts._clusters("👩\u200d👧"))


@pytest.mark.parametrize(
    "text", ["👩‍👩‍👧 ❤️ 🇩🇪 👍🏽", "\u0301", "\U000e0041", "\U0010ffff", "\ud800\udc00", "\u200d", "z" + "\u0335" * 300]
)
def test_odd_text_is_measured_and_drawn(text):
    line = clean(text)
    assert Lettering(14).length(line) >= 0 and Lettering(14).extent(line)[0] >= 0
    drawn(line)
    undrawable(text)


def test_the_command_says_what_it_could_not_write(tiny, picture, tmp_path):
    config = tmp_path / "fonts.conf"
    config.write_text('<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig></fontconfig>')
    font, sheet = make_font(tmp_path / "block.ttf", "杯子在哪里？"), tmp_path / "sheet.png"
    words = (picture, "杯子在哪里？", "--draw", sheet)
    plain = short(tiny, picture, "杯子在哪里？")
    lost = short(tiny, *words, FONTCONFIG_FILE=str(config), MIGICIAN_FONT="")
    found = short(tiny, *words, FONTCONFIG_FILE=str(config), MIGICIAN_FONT=str(font))
    for done in (lost, found):
        assert (done.returncode, done.stdout) == (0, plain.stdout), done.stderr
        assert f"wrote {sheet}" in done.stderr
    if shutil.which("fc-match"):
        assert "--draw: no font here has 杯子在哪里？" in lost.stderr and "fonts-noto-cjk" in lost.stderr
    assert not any(letter in found.stderr for letter in "杯子在哪里？")
    bad = short(tiny, *words, MIGICIAN_FONT=str(config))
    assert bad.returncode == 1 and "migician-run: MIGICIAN_FONT=" in bad.stderr and "Traceback" not in bad.stderr
