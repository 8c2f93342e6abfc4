"""llama.cpp through its own command line, llama-mtmd-cli: one process per answer, timings from its log at -lv 4.

    mtmd batch encoding done in 16216 ms                                      each picture
    llama_perf_context_print: prompt eval time = 23027.24 ms /   402 tokens   pictures and prompt
    llama_perf_context_print:        eval time =   152.29 ms /     3 runs     single tokens

The clock of "prompt eval" starts at the first text before a picture and stops at the first token, so that encoding is
in it and is taken off here. Reading and resizing pictures come before any clock and are in no phase, nor is loading.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...runtime.errors import MigicianError
from ...runtime.image import open_picture
from ..engines import Answered, Picture, Times, exact_length_only

__all__ = ["LlamaCpp", "read_log"]

_ENCODED = re.compile(r"\b(?:encoded|encoding done) in ([\d.]+) ms")
_PROMPT = re.compile(r"prompt eval time =\s*([\d.]+) ms /\s*(\d+) tokens")
_SINGLE = re.compile(r"(?<!prompt)\s+eval time =\s*([\d.]+) ms /\s*(\d+) runs")
_VERSION = re.compile(r"version: (.+)")


def read_log(text: str, pictures: int, new_tokens: int) -> Times:
    """The phases in one log. Raises MigicianError where a line is missing or the counts are others."""
    encoded, prompt, single = _ENCODED.findall(text), _PROMPT.search(text), _SINGLE.search(text)
    if len(encoded) < pictures or prompt is None or single is None:
        tail = " | ".join(text.strip().splitlines()[-3:])
        raise MigicianError(f"llama.cpp: no timings in its log ({tail[:300]}); run it by hand to see why")
    if int(single[2]) != new_tokens - 1:
        raise MigicianError(
            f"llama.cpp: {single[2]} single steps where {new_tokens - 1} were asked for; not comparable"
        )
    vision = sum(map(float, encoded))
    prefill, decode = float(prompt[1]) - vision, float(single[1])
    return Times(
        prompt_tokens=int(prompt[2]),
        new_tokens=new_tokens,
        total_ms=vision + prefill + decode,
        vision_ms=vision,
        prefill_ms=prefill,
        decode_ms=decode,
    )


class LlamaCpp:
    """A build folder or program, a language model and a picture projector in GGUF."""

    name, family = "llama.cpp", "qwen2_vl"

    def __init__(self, place: str | None, gguf: str | None, mmproj: str | None, *, threads: int) -> None:
        self._program = self._find(Path(place or ""))
        if not gguf or not mmproj:
            raise MigicianError("llama.cpp: no model; give --gguf and --mmproj, as its own converter writes them")
        self._models = ["-m", gguf, "--mmproj", mmproj]
        self._threads = ["-t", str(threads), "-tb", str(threads)] if threads else []
        done = subprocess.run([self._program, "--version"], capture_output=True, text=True, check=False)
        found = _VERSION.search(done.stdout + done.stderr)
        self.versions = {"llama.cpp": found[1].strip() if found else "unknown"}

    @staticmethod
    def _find(place: Path) -> str:
        for path in (place, place / "llama-mtmd-cli", place / "bin" / "llama-mtmd-cli"):
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
        raise MigicianError(f"llama.cpp: no llama-mtmd-cli in {place}; give --llama-cpp its build folder")

    def answer(self, images: Sequence[Picture], text: str, max_new_tokens: int, *, exact: bool = False) -> Answered:
        """Answers once, in a process of its own."""
        from PIL import Image

        exact_length_only(self.name, exact)
        with tempfile.TemporaryDirectory() as folder:
            words: list[str] = []
            for i, image in enumerate(images):
                picture = Image.fromarray(image) if isinstance(image, np.ndarray) else open_picture(image)
                picture.save(f"{folder}/{i}.png")
                words += ["--image", f"{folder}/{i}.png"]
            command = [self._program, *self._models, *self._threads, *words, "-p", text, "-n", str(max_new_tokens)]
            command += ["--temp", "0", "--repeat-penalty", "1", "--ignore-eos", "-ngl", "0", "--jinja", "-lv", "4"]
            with open(f"{folder}/log", "w+") as log, open(f"{folder}/answer", "w+") as written:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=written, stderr=log)
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                for file in (log, written):
                    file.seek(0)
                told, answer = log.read(), written.read()
        if process.returncode:
            tail = (told or answer).strip()[-300:]
            raise MigicianError(f"llama.cpp: ended with {process.returncode} ({tail}); run it by hand")
        # whether its timings are on stdout or on stderr has changed between its versions
        times = read_log(told + answer, len(images), max_new_tokens)
        return Answered(answer.strip(), replace(times, peak_rss_mb=round(usage.ru_maxrss / 1024, 1)))

    def close(self) -> None:
        """Nothing is held."""
