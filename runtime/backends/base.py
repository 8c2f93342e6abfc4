"""What an engine must do for a model: the one seam behind which a runtime computes.

An engine holds one checkpoint's weights and one timeline of tokens. Words, picture files and boxes stay on this side.
It is used by one thread at a time; only `cancel` may come from another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Encoded", "Engine", "Options"]


@dataclass(frozen=True)
class Options:
    """How to compute. threads: 0 is one per core.   fp32: activations are never rounded, sums are float."""

    threads: int = 0
    fp32: bool = False


class Encoded(Protocol):
    """One picture as the language model reads it, usable for as long as its engine lives.

    tokens: cells that it takes in a prompt.   bytes: of memory that it holds.
    A picture counts as the same one in a later prompt only if it is the same object.
    """

    @property
    def tokens(self) -> int: ...

    @property
    def bytes(self) -> int: ...


class Engine(Protocol):
    """One model, ready to compute.

    verify_rows: most tokens of one `verify`, 1 where drafts bring nothing.   weights_bytes: of the weights in use.
    versions: what computes, for reports: {"kernels": "avx2"}, {"torch": "2.13.0", "device": "cpu"}.
    """

    @property
    def verify_rows(self) -> int: ...

    @property
    def weights_bytes(self) -> int: ...

    @property
    def versions(self) -> dict[str, str]: ...

    def grow(self, tokens: int) -> None:
        """Makes room for a timeline of that many tokens, and keeps what is on it where memory allows.

        Raises OutOfMemory.
        """

    def encode(self, rgb: "np.ndarray") -> Encoded:
        """Encodes one picture, u8[H, W, 3], both sides multiples of a merged cell. The timeline is not touched."""

    def sync(self, ids: Sequence[int], pictures: Sequence[Any]) -> int:
        """Makes the timeline hold exactly these tokens; pictures[i], from encode, is the i-th run of picture tokens.

        Returns how many of the tokens did not have to be computed. Raises ContextFullError without room for them.
        """

    def append(self, ids: Sequence[int], *, logprobs: bool = False) -> "np.ndarray | None":
        """Appends text tokens; with logprobs, returns f32[len(ids)], each token's natural log-probability."""

    def greedy(self, repetition_penalty: float = 1.0) -> tuple[int, float]:
        """Returns the most probable next token and its log-probability without the penalty.

        The penalty divides positive and multiplies negative logits of every token on the timeline.
        """

    def verify(self, ids: Sequence[int], repetition_penalty: float = 1.0) -> list[tuple[int, float]]:
        """Appends ids[0] and as many of the guesses behind it as are the greedy choice, in one pass.

        ids: 1 to verify_rows.   Returns the greedy choice after each appended token, with its log-probability: the
        guesses that came true, and the next token, which is not on the timeline yet.
        """

    def cancel(self) -> None:
        """Stops the work of another thread within one layer; the call there raises Cancelled."""

    def after_fork(self, interrupted: bool) -> None:
        """Makes the engine usable in a forked child, whose only thread calls this.

        interrupted: another thread of the parent was computing; what it was at may be lost.
        """

    def close(self) -> None:
        """Lets go of weights and timeline; nothing else may be called after it."""
