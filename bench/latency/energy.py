"""Energy that the machine itself reports: RAPL counters of a PC or server, tegrastats on a Jetson.

Both count the whole package or board, whoever uses it.
"""

import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Protocol

__all__ = ["Meter", "find_meter", "rapl_zones", "tegra_watts"]

POWERCAP = Path("/sys/class/powercap")
_INTERVAL_MS = 100
_INPUT = re.compile(r"\b(?:VDD_IN|POM_5V_IN|VIN_SYS_5V0) (\d+)(?:mW)?/")


class Meter(Protocol):
    """A running count."""

    source: str

    def joules(self) -> float:
        """The count so far; differences mean something."""

    def close(self) -> None:
        """Stops counting."""


def find_meter(root: Path = POWERCAP) -> Meter | None:
    """The machine's meter, or None where it reports nothing or does not let this user read it."""
    zones = rapl_zones(root)
    if zones:
        return _Rapl(zones)
    program = shutil.which("tegrastats")
    return _Tegra(program) if program else None


def rapl_zones(root: Path) -> list[Path]:
    """The readable package zones (intel-rapl:0, ...; AMD's too), without the parts inside them."""
    zones = []
    for zone in sorted(root.glob("*-rapl:*")):
        if zone.name.count(":") != 1:
            continue
        try:
            int((zone / "energy_uj").read_text())
        except (OSError, ValueError):  # readable by root alone on many systems
            continue
        zones.append(zone)
    return zones


class _Rapl:
    """Adds up the packages; a counter that wrapped is taken to have done so once since the last look."""

    source = "RAPL"

    def __init__(self, zones: list[Path]) -> None:
        self._zones = zones
        self._last = [self._read(zone, "energy_uj") for zone in zones]
        self._ranges = [self._read(zone, "max_energy_range_uj") for zone in zones]
        self._total = 0

    @staticmethod
    def _read(zone: Path, name: str) -> int:
        try:
            return int((zone / name).read_text())
        except (OSError, ValueError):
            return 0

    def joules(self) -> float:
        for i, zone in enumerate(self._zones):
            now = self._read(zone, "energy_uj")
            spent = now - self._last[i]
            self._total += spent if spent >= 0 else spent + self._ranges[i]
            self._last[i] = now
        return self._total / 1e6

    def close(self) -> None:
        pass


def tegra_watts(line: str) -> float | None:
    """The board's input power in one line of tegrastats, W."""
    found = _INPUT.search(line)
    return int(found[1]) / 1000 if found else None


class _Tegra:
    """Adds up tegrastats' readings, each times the time since the one before."""

    source = "tegrastats"

    def __init__(self, program: str) -> None:
        command = [program, "--interval", str(_INTERVAL_MS)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._total = 0.0
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        last = time.monotonic()
        for line in self._process.stdout:
            now = time.monotonic()
            self._total += (tegra_watts(line) or 0.0) * (now - last)
            last = now

    def joules(self) -> float:
        return self._total

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join()
