"""Which machine this is: what every figure must name."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__

__all__ = ["cores", "machine", "processor"]

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16", "sve")


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo; empty elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def processor() -> str:
    """Names the processor, with its family and model where its name leaves them open."""
    info = _cpuinfo()
    name = info.get("model name") or info.get("Model") or platform.processor() or platform.machine()
    if "cpu family" in info and "model" in info:  # "AMD EPYC" alone does not tell Zen 3 from Zen 5
        name += f" (family {info['cpu family']} model {info['model']})"
    elif "CPU part" in info:
        name += f" (implementer {info.get('CPU implementer')} part {info['CPU part']})"
    return name


def cores() -> int | None:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _board() -> str | None:
    """A board's own name, as a Jetson or a Raspberry Pi tells it."""
    try:
        return Path("/proc/device-tree/model").read_text().strip("\0 \n") or None
    except (OSError, UnicodeDecodeError):
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def machine() -> dict[str, Any]:
    """cpu, cores (that this process may use), flags, memory_gib, board, system, python, migician, numpy."""
    info = _cpuinfo()
    words = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": processor(),
        "cores": cores(),
        "flags": [flag for flag in _FLAGS if flag in words],
        "memory_gib": _memory_gib(),
        "board": _board(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "migician": __version__,
        "numpy": version("numpy"),
    }
