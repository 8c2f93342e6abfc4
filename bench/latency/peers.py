"""Which engines run beside ours, in which settings, and how each answers in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.errors import MigicianError
from .workload import Case

__all__ = ["PEERS", "EngineFailed", "EngineMissing", "Setting", "answers", "choose_peers"]

# onnxruntime has no settings: this release writes no ONNX form of a model that it could be given
PEERS: Mapping[str, tuple[str, ...]] = {
    "transformers": ("bf16", "fp32"),
    "onnxruntime": ("",),
    "openvino": ("bf16", "f32"),
    "llama.cpp": ("",),
}
_PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Setting:
    """One engine in one setting."""

    engine: str
    variant: str = ""

    @property
    def name(self) -> str:
        """What tables call it: transformers bf16."""
        return f"{self.engine} {self.variant}".strip()


class EngineMissing(MigicianError):
    """An engine that is not there; the message says why."""


class EngineFailed(MigicianError):
    """An engine that is there and did not answer; the message says why."""


def choose_peers(words: str) -> list[Setting]:
    """Reads "transformers,openvino:f32": an engine in all its settings, or in one.

    Raises MigicianError for an unknown engine or setting.
    """
    chosen: list[Setting] = []
    for word in filter(None, (w.strip() for w in words.split(","))):
        engine, _, variant = word.partition(":")
        if engine not in PEERS:
            raise MigicianError(f"--against {word}: no such engine; choose from {', '.join(PEERS)}")
        if variant and variant not in PEERS[engine]:
            names = " or ".join(f"{engine}:{v}" for v in PEERS[engine] if v) or engine
            raise MigicianError(f"--against {word}: no such setting; choose {names}")
        chosen += [Setting(engine, v) for v in ([variant] if variant else PEERS[engine])]
    return list(dict.fromkeys(chosen))


def _command(
    setting: Setting, interpreters: Mapping[str, str], spec: dict[str, Any], folder: str
) -> tuple[list[str], dict[str, str]]:
    """The worker's command line and environment; another interpreter finds this package in `folder`."""
    python = interpreters.get(setting.engine, sys.executable)
    env = dict(os.environ)
    if python != sys.executable:
        os.symlink(_PACKAGE, f"{folder}/migician")  # this package and nothing else of what is installed here
        env["PYTHONPATH"] = folder
    return [python, "-m", "migician.bench.latency.worker", json.dumps(spec)], env


def answers(
    setting: Setting,
    options: Mapping[str, Any],
    cases: Sequence[Case],
    *,
    repeat: int,
    warm_up: int,
    interpreters: Mapping[str, str],
) -> Iterator[dict[str, Any]]:
    """Starts the engine and yields its events: "loaded", then "run" for each case. The process ends with the iterator.

    Raises EngineMissing, EngineFailed.
    """
    if setting.engine == "onnxruntime":
        raise EngineMissing("this release writes no ONNX form of a model that it could run")
    spec = {
        "engine": setting.engine,
        "variant": setting.variant,
        "options": dict(options),
        "cases": [case.to_dict() for case in cases],
        "repeat": repeat,
        "warm_up": warm_up,
    }
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+", errors="replace") as log:
        command, env = _command(setting, interpreters, spec, folder)
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=env, text=True)
        except OSError as error:
            raise EngineMissing(f"{command[0]}: cannot be started ({error.strerror}); name a Python") from None
        try:
            yield from _events(process)
            if process.wait():
                log.seek(0)
                raise EngineFailed(_ending(process.returncode, log.read()))
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _events(process: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "missing":
            raise EngineMissing(event["why"])
        if event["event"] == "failed":
            raise EngineFailed(event["why"])
        yield event


def _ending(status: int, log: str) -> str:
    """Why a process ended that did not say so itself."""
    if status == -9:
        return "its process was killed, most likely for want of memory; free some or take fewer pictures"
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "no word on stderr")
    return f"its process ended with status {status}: {last.strip()[:300]}"
