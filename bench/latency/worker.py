"""One engine in a process of its own: loads, warms up, answers every case once, and reports each on a line of JSON.

    python -m migician.bench.latency.worker '{"engine": "migician", "variant": "auto", "options": {...}, "cases": [...],
                                              "repeat": 0, "warm_up": 1}'

Lines: {"event": "loaded", "load_ms", "versions"}, {"event": "run", "case": i, "run": {...}} for each case, and where it
fails {"event": "missing" or "failed", "why"}. Whatever a library prints goes to stderr.
"""

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...runtime.errors import MigicianError
from .energy import Meter, find_meter
from .workload import WARM_UP, Case, Engine, pictures

__all__ = ["ENGINES", "main", "peak_rss_mb", "reset_peak"]


def _native(variant: str, options: dict[str, Any]) -> Engine:
    from .native import Native

    return Native(options["model"], threads=options["threads"], precision=variant)


def _transformers(variant: str, options: dict[str, Any]) -> Engine:
    from .transformers_peer import Transformers

    return Transformers(options["reference"], threads=options["threads"], dtype=variant)


def _openvino(variant: str, options: dict[str, Any]) -> Engine:
    from .openvino_peer import OpenVino

    return OpenVino(options["openvino"], threads=options["threads"], hint=variant)


def _llama_cpp(variant: str, options: dict[str, Any]) -> Engine:
    from .llama_peer import LlamaCpp

    return LlamaCpp(options["llama_cpp"], options["gguf"], options["mmproj"], threads=options["threads"])


ENGINES: dict[str, Callable[[str, dict[str, Any]], Engine]] = {
    "migician": _native,
    "transformers": _transformers,
    "openvino": _openvino,
    "llama.cpp": _llama_cpp,
}


def reset_peak() -> None:
    """Starts the count of peak memory anew where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_mb() -> float:
    """Peak resident memory of this process since reset_peak(), mapped weights included."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path("/proc/self/status").read_text()
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def _measure(engine: Engine, case: Case, repeat: int, meter: Meter | None) -> dict[str, Any]:
    images = pictures(case, repeat)
    reset_peak()
    before = meter.joules() if meter else 0.0
    run = engine.run(case, images)
    run["energy_j"] = meter.joules() - before if meter else None
    run.setdefault("peak_rss_mb", peak_rss_mb())
    return run


def _work(spec: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    start = time.perf_counter()
    engine = ENGINES[spec["engine"]](spec["variant"], spec["options"])
    say({"event": "loaded", "load_ms": 1000 * (time.perf_counter() - start), "versions": engine.versions})
    meter = find_meter()
    try:
        for i in range(spec["warm_up"]):
            engine.run(WARM_UP, pictures(WARM_UP, (1 << 30) + i))
        for number, case in enumerate(spec["cases"]):
            run = _measure(engine, Case(**case), spec["repeat"], meter)
            say({"event": "run", "case": number, "run": run, "meter": meter.source if meter else None})
    finally:
        if meter:
            meter.close()


def main() -> None:
    """Runs what the first argument describes."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(event: dict[str, Any]) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    try:
        _work(json.loads(sys.argv[1]), say)
    except ImportError as error:
        say({"event": "missing", "why": f"not installed here ({error})"})
        sys.exit(1)
    except MigicianError as error:
        say({"event": "failed", "why": str(error)})
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        say({"event": "failed", "why": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
