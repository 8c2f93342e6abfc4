"""OpenVINO GenAI's VLMPipeline on the CPU, on a folder that optimum-cli exported.

It tells the time of its embeddings (pictures resized and encoded, words embedded), of the whole and of each token; the
prompt's time is what is left. Its scheduler keeps prefixes between calls: pictures that differ keep it from using them.
"""

import itertools
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import MigicianError
from ...runtime.image import open_picture
from ..engines import Answered, Picture, Times, exact_length_only

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

    family = "qwen2_vl"

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
        self.name = f"openvino {hint}"
        self.versions = {name: version(name) for name in ("openvino", "openvino-genai")}

    def answer(self, images: Sequence[Picture], text: str, max_new_tokens: int, *, exact: bool = False) -> Answered:
        """Answers once."""
        exact_length_only(self.name, exact)
        config = self._pipe.get_generation_config()
        config.max_new_tokens, config.ignore_eos, config.do_sample = max_new_tokens, True, False
        config.repetition_penalty = 1.0
        pixels = [i if isinstance(i, np.ndarray) else np.asarray(open_picture(i)) for i in images]
        tensors = [self._openvino.Tensor(np.ascontiguousarray(image[None])) for image in pixels]
        start = time.perf_counter()
        result = self._pipe.generate(text, images=tensors, generation_config=config)
        total = 1000 * (time.perf_counter() - start)
        metrics = result.perf_metrics
        count = metrics.get_num_generated_tokens()
        if count != max_new_tokens:
            raise MigicianError(f"openvino: {count} new tokens where {max_new_tokens} were asked for; not comparable")
        times = [float(moment) for moment in metrics.raw_metrics.m_new_token_times]
        phases = split(total, metrics.get_prepare_embeddings_duration().mean, times)
        return Answered(result.texts[0], Times(metrics.get_num_input_tokens(), count, **phases))

    def close(self) -> None:
        """Lets go of the pipeline."""
        del self._pipe
