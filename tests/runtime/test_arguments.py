"""What callers pass wrongly is one MigicianError that names the argument, before any work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from migician import MigicianError, Model, load
from migician.runtime.arguments import check_count, check_factor, check_text


@pytest.fixture(scope="module")
def model(tiny: Path):  # type: ignore[no-untyped-def]
    with load(tiny, threads=1) as model:
        yield model


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


NOT_TEXT = [None, 5, b"where?", ["where?"], Path("x"), np.zeros(3), Odd()]
NOT_COUNTS = ["6", 6.0, True, False, 0, -1, None, [6], 1 << 31, float("nan"), np.float32(3), Odd()]
NOT_FACTORS = ["1.1", True, 0, -1.0, float("nan"), float("inf"), [1.1], "x", 1j, Odd()]


def raises(name: str, value: Any, ask: Any) -> None:
    with pytest.raises(MigicianError, match=f"^{name} is ") as caught:
        ask(value)
    message = str(caught.value)
    assert "\n" not in message and "; give " in message and len(message) < 160
    assert type(value).__name__ in message or repr(value) in message


@pytest.mark.parametrize("value", NOT_TEXT)
def test_words_that_are_no_string(model: Model, picture: Path, value: Any) -> None:
    raises("prompt", value, lambda v: model.ground([picture], v))
    raises("prompt", value, lambda v: model.stream([picture], v))
    raises("prompt", value, lambda v: model.chat([picture]).ask(v))
    raises("prompt", value, lambda v: model.logprobs([picture], v, "a cup"))
    raises("answer_text", value, lambda v: model.logprobs([picture], "where?", v))
    if value is not None:
        raises("system", value, lambda v: model.ground([picture], "where?", system=v))
        raises("system", value, lambda v: model.chat([picture], system=v))


@pytest.mark.parametrize("value", NOT_COUNTS)
def test_numbers_of_tokens(model: Model, picture: Path, value: Any) -> None:
    raises("max_new_tokens", value, lambda v: model.ground([picture], "where?", max_new_tokens=v))
    raises("max_new_tokens", value, lambda v: model.chat([picture]).ask("where?", max_new_tokens=v))
    if value is not None:
        raises("max_side", value, lambda v: model.ground([picture], "where?", max_side=v))
        raises("max_side", value, lambda v: model.chat([picture], max_side=v))


@pytest.mark.parametrize("value", NOT_FACTORS)
def test_penalties(model: Model, picture: Path, value: Any) -> None:
    raises("repetition_penalty", value, lambda v: model.ground([picture], "where?", repetition_penalty=v))
    raises("repetition_penalty", value, lambda v: model.chat([picture]).ask("where?", repetition_penalty=v))


@pytest.mark.parametrize("name", ["threads", "min_pixels", "max_pixels", "cache_bytes"])
def test_numbers_of_load(tiny: Path, name: str) -> None:
    for value in ("4", 2.5, True, -1, [1]):
        raises(name, value, lambda v: load(tiny, **{name: v}))


def test_a_wrong_argument_leaves_an_unfinished_stream_alone(model: Model, picture: Path) -> None:
    stream = model.stream([picture], "where?", max_new_tokens=4)
    next(stream)
    raises("prompt", None, lambda v: model.ground([picture], v))
    assert stream.finish().finish in ("stop", "length")


def test_numbers_of_numpy_and_strings_of_other_classes_are_taken(model: Model, picture: Path) -> None:
    class Words(str):
        pass

    plain = model.ground([picture], "where?", max_new_tokens=3, repetition_penalty=1.5)
    same = model.ground(
        [picture], Words("where?"), max_new_tokens=np.int64(3), max_side=None, repetition_penalty=np.float32(1.5)
    )
    assert same.text == plain.text
    assert model.ground([picture], "where?", max_new_tokens=3, repetition_penalty=1).tokens


def test_checks_return_what_was_meant() -> None:
    assert check_count("n", np.uint8(7)) == 7 and type(check_count("n", np.uint8(7))) is int
    assert check_factor("x", 2) == 2.0 and check_text("t", "é", what="words") == "é"
    assert check_count("n", 0, least=0) == 0
    with pytest.raises(MigicianError, match=r"^n is 11; give a whole number, at most 10$"):
        check_count("n", 11, most=10)
    with pytest.raises(MigicianError, match=r"^n is '6'; give a whole number, at least 1$"):
        check_count("n", "6")
    with pytest.raises(MigicianError, match=r"\(list\); give"):
        check_text("t", ["x" * 99], what="words")
