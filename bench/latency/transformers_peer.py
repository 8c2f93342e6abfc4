"""transformers' Qwen2-VL on the CPU: sdpa attention, its KV cache, all pictures encoded in one call."""

import time
from importlib.metadata import version
from typing import Any

import numpy as np

from ...runtime.files.open import open_checkpoint
from ...runtime.prompt import Vocabulary, build_prompt
from .workload import PROMPT, Case, Laps

__all__ = ["Transformers"]

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class Transformers:
    """A checkpoint folder in one dtype, "bf16" or "fp32". Raises ImportError where torch or transformers is missing."""

    def __init__(self, folder: str, *, threads: int, dtype: str) -> None:
        import torch
        from transformers import Qwen2VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, _DTYPES[dtype])
        ).eval()
        self._processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        with open_checkpoint(folder) as checkpoint:
            self._vocabulary = Vocabulary(checkpoint.tokenizer_json)
        self.versions = {name: version(name) for name in ("transformers", "torch")}

    def run(self, case: Case, images: list[np.ndarray]) -> dict[str, Any]:
        """Answers once; nothing is kept between calls."""
        torch, model = self._torch, self._model
        laps = Laps()
        got, ids = self._prepare(images)
        laps.lap("preprocess")
        with torch.no_grad():
            grids = got["image_grid_thw"]
            cells = model.model.visual(got["pixel_values"].to(model.dtype), grid_thw=grids).pooler_output
            laps.lap("vision")
            kinds = (ids == model.config.image_token_id).int()
            positions, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=grids)
            embeds = model.get_input_embeddings()(ids)
            embeds = embeds.masked_scatter(kinds.bool()[..., None], cells.to(embeds.dtype))
            out = model(inputs_embeds=embeds, position_ids=positions, use_cache=True, logits_to_keep=1)
            laps.lap("prefill")
            steps = self._decode(out, int(positions.max()) + 1, case.new_tokens)
            laps.lap("decode")
        return laps.to_run() | {"steps_ms": steps, "prompt_tokens": ids.shape[1], "new_tokens": case.new_tokens}

    def _prepare(self, images: list[np.ndarray]) -> tuple[Any, Any]:
        from PIL import Image

        got = self._processor([Image.fromarray(image) for image in images], return_tensors="pt")
        counts = [int(t * h * w) // self._processor.merge_size**2 for t, h, w in got["image_grid_thw"]]
        return got, self._torch.tensor([build_prompt(self._vocabulary, PROMPT, counts)])

    def _decode(self, out: Any, at: int, new_tokens: int) -> list[float]:
        """Takes the most probable token so many times; returns the milliseconds of each step between."""
        torch, steps = self._torch, []
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        for step in range(new_tokens - 1):
            start = time.perf_counter()
            where = torch.full((3, 1, 1), at + step)
            out = self._model(input_ids=token, position_ids=where, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            steps.append(1000 * (time.perf_counter() - start))
        return steps
