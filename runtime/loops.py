"""Answers that run in a loop: the same box, phrase or list again and again, until their tokens are used up."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Loop", "find_loop"]

MIN_TOKENS = 24  # shorter ends repeat by chance: digits, the brackets of a box
MIN_TIMES = 3


@dataclass(frozen=True)
class Loop:
    """An answer's end from token `start` on: the same `period` tokens, `times` times and perhaps begun once more."""

    start: int
    period: int
    times: int


def find_loop(tokens: Sequence[int]) -> Loop | None:
    """Finds the longest end that repeats one sequence at least three times, over at least 24 tokens.

    Only an answer that was cut can be said to loop; one that ended by itself meant what it repeated. Of all such ends
    the longest, with its shortest period.   Cost: O(T).
    Source: the border table of Knuth, Morris and Pratt (1977), over the tokens in reverse.
    """
    backward = list(reversed(tokens))
    border = [0] * (len(backward) + 1)  # border[n]: the longest proper prefix of backward[:n] that also ends it
    length, found = 0, None
    for n in range(2, len(backward) + 1):
        while length and backward[n - 1] != backward[length]:
            length = border[length]
        length += backward[n - 1] == backward[length]
        border[n] = length
        period = n - length
        if n >= MIN_TOKENS and n >= MIN_TIMES * period:
            found = Loop(len(tokens) - n, period, n // period)
    return found
