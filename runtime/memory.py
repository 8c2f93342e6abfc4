"""How much memory this process took at most."""

import contextlib
import resource
import sys
from pathlib import Path

__all__ = ["peak_rss_mb", "reset_peak"]


def reset_peak() -> None:
    """Starts the count of peak memory anew where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_mb() -> float:
    """Peak resident memory of this process since reset_peak() or its start, in MB (2^20), mapped weights included."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path("/proc/self/status").read_text()
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)
