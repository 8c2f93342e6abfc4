"""OpenVINO GenAI's VLMPipeline on the CPU, on a folder that optimum-cli exported.

It tells the time of its embeddings (pictures resized and encoded, words embedded), of the whole and of each token; the
prompt's time is what is left. Its scheduler keeps prefixes between calls: pictures that differ keep it from using them.
"""

import itertools
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import MigicianError
from .workload import PROMPT, Case

__all__ = ["OpenVino", "split"]


def split(total_ms: float, embeddings_ms: float, token_times_ms: list[float]) -> dict[str, Any]:
    """The phases of one call: token_times_ms are moments at which tokens were ready, in order."""
    steps = [later - sooner for sooner, later in itertools.pairwise(token_times_ms)]
    decode = sum(steps)
    return {
        "preprocess_ms": None,  # in vision_ms
        "vision_ms": embeddings_ms,
        "prefill_ms": total_ms - embeddings_ms - decode,
        "decode_ms": decode,
        "total_ms": total_ms,
        "steps_ms": steps,
    }


class OpenVino:
    """An exported folder under one precision hint, "bf16" or "f32"."""

    def __init__(self, folder: str | None, *, threads: int, hint: str) -> None:
        self._openvino = import_module("openvino")
        genai = import_module("openvino_genai")
        if not folder or not Path(folder).is_dir():
            raise MigicianError(
                f"openvino: {folder or 'no folder'}: give --openvino the folder of optimum-cli's export"
            )
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        self._pipe = genai.VLMPipeline(folder, "CPU", **settings)
        self.versions = {name: version(name) for name in ("openvino", "openvino-genai")}

    def run(self, case: Case, images: list[np.ndarray]) -> dict[str, Any]:
        """Answers once."""
        config = self._pipe.get_generation_config()
        config.max_new_tokens, config.ignore_eos, config.do_sample = case.new_tokens, True, False
        config.repetition_penalty = 1.0
        tensors = [self._openvino.Tensor(np.ascontiguousarray(image[None])) for image in images]
        start = time.perf_counter()
        result = self._pipe.generate(PROMPT, images=tensors, generation_config=config)
        total = 1000 * (time.perf_counter() - start)
        metrics = result.perf_metrics
        count = metrics.get_num_generated_tokens()
        if count != case.new_tokens:
            raise MigicianError(f"openvino: {count} new tokens where {case.new_tokens} were asked for; not comparable")
        times = [float(moment) for moment in metrics.raw_metrics.m_new_token_times]
        phases = split(total, metrics.get_prepare_embeddings_duration().mean, times)
        return phases | {"prompt_tokens": metrics.get_num_input_tokens(), "new_tokens": count}
