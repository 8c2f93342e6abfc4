"""A lock that is handed on in the order in which it was asked for, so that no thread of a pool starves."""

import threading
from collections import deque

from .errors import MigicianError

__all__ = ["FairLock"]


class FairLock:
    """First come, first served; with a `with` statement. Ctrl-C interrupts the waiting.

    Raises MigicianError in a thread that holds it already (a signal handler that asks in the middle of an answer).
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._owner: int | None = None

    @property
    def held(self) -> bool:
        """Whether some thread holds it."""
        return self._owner is not None

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._owner == me:
            raise MigicianError("this thread is in the middle of an answer; ask again once it has ended")
        with self._guard:
            if self._owner is None:
                self._owner = me
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        try:
            gate.acquire()  # until the one before hands it on
        except BaseException:
            self._leave(gate)
            raise
        self._owner = me

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._hand_on()

    def _leave(self, gate: threading.Lock) -> None:
        """Gives up a place in the line, or what was handed over at that very moment."""
        with self._guard:
            if gate in self._waiting:
                self._waiting.remove(gate)
            else:
                self._hand_on()

    def _hand_on(self) -> None:
        if self._waiting:
            self._owner = -1  # nobody's yet, and not free either
            self._waiting.popleft().release()
        else:
            self._owner = None
