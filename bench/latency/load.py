"""Whether a run of figures was a quiet one."""

import os

__all__ = ["busy", "load_average"]

_BUSY = 0.5  # processes beside ours for each of our threads, above which a run is no measurement


def load_average() -> float | None:
    """Processes that wanted to run in the last minute, this one included."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def busy(load: float | None, threads: int) -> str | None:
    """Says that others wanted the processors too, where a run's load average before it tells so."""
    if load is None or load <= _BUSY * max(threads, 1):
        return None
    return f"the machine was busy (load average {load:.1f} before the run): these are figures of a busy machine"
