"""One engine in a process of its own: loads, warms up, answers every case once, and reports each on a line of JSON.

    python -m migician.bench.latency.worker '{"engine": "migician", "variant": "auto", "options": {...}, "cases": [...],
                                              "repeat": 0, "warm_up": 1}'

Lines: {"event": "loaded", "load_ms", "versions"}, {"event": "run", "case": i, "run": {...}} for each case, and where it
fails {"event": "missing" or "failed", "why"}. Whatever a library prints goes to stderr.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from ...runtime.errors import MigicianError
from ...runtime.memory import peak_rss_mb, reset_peak
from ..engines import Engine
from .energy import Meter, find_meter
from .workload import PROMPT, WARM_UP, Case, pictures

__all__ = ["ENGINES", "main"]


def _backend(variant: str, options: dict[str, Any]) -> Engine:
    from .backend import Backend

    return Backend(options["model"], backend=options["backend"], threads=options["threads"], precision=variant)


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
    "migician": _backend,
    "transformers": _transformers,
    "openvino": _openvino,
    "llama.cpp": _llama_cpp,
}


def _measure(engine: Engine, case: Case, repeat: int, meter: Meter | None) -> dict[str, Any]:
    images = pictures(case, repeat)
    reset_peak()
    before = meter.joules() if meter else 0.0
    times = engine.answer(images, PROMPT, case.new_tokens, exact=True).times
    energy = meter.joules() - before if meter else None
    if times is None:
        raise MigicianError(f"{engine.name}: does not tell its times; leave it out")
    peak = peak_rss_mb() if times.peak_rss_mb is None else times.peak_rss_mb
    return {**times.to_dict(), "energy_j": energy, "peak_rss_mb": peak}


def _work(spec: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    start = time.perf_counter()
    engine = ENGINES[spec["engine"]](spec["variant"], spec["options"])
    say({"event": "loaded", "load_ms": 1000 * (time.perf_counter() - start), "versions": dict(engine.versions)})
    meter = find_meter()
    try:
        for i in range(spec["warm_up"]):
            engine.answer(pictures(WARM_UP, (1 << 30) + i), PROMPT, WARM_UP.new_tokens, exact=True)
        for number, case in enumerate(spec["cases"]):
            run = _measure(engine, Case(**case), spec["repeat"], meter)
            say({"event": "run", "case": number, "run": run, "meter": meter.source if meter else None})
    finally:
        if meter:
            meter.close()
        engine.close()


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
