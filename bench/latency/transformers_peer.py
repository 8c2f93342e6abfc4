"""transformers' Qwen2-VL on the CPU: sdpa attention, its KV cache, all pictures encoded in one call."""

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from ...runtime.files.open import open_checkpoint
from ...runtime.image import open_picture
from ...runtime.prompt import Vocabulary, build_prompt
from ..engines import Answered, Laps, Picture, exact_length_only

__all__ = ["Transformers"]

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class Transformers:
    """A checkpoint folder in one dtype, "bf16" or "fp32". Raises ImportError where torch or transformers is missing."""

    family = "qwen2_vl"

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
        self.name = f"transformers {dtype}"
        self.versions = {name: version(name) for name in ("transformers", "torch")}

    def answer(self, images: Sequence[Picture], text: str, max_new_tokens: int, *, exact: bool = False) -> Answered:
        """Answers once; nothing is kept between calls."""
        exact_length_only(self.name, exact)
        torch, model = self._torch, self._model
        laps = Laps()
        got, ids = self._prepare(images, text)
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
            tokens, steps = self._decode(out, int(positions.max()) + 1, max_new_tokens)
            laps.lap("decode")
        written = self._vocabulary.decode((int(token) for token in tokens), skip_special=True)
        return Answered(written, laps.times(ids.shape[1], steps))

    def close(self) -> None:
        """Lets go of the weights."""
        del self._model

    def _prepare(self, images: Sequence[Picture], text: str) -> tuple[Any, Any]:
        from PIL import Image

        pictures = [Image.fromarray(i) if isinstance(i, np.ndarray) else open_picture(i) for i in images]
        got = self._processor(pictures, return_tensors="pt")
        counts = [int(t * h * w) // self._processor.merge_size**2 for t, h, w in got["image_grid_thw"]]
        return got, self._torch.tensor([build_prompt(self._vocabulary, text, counts)])

    def _decode(self, out: Any, at: int, new_tokens: int) -> tuple[list[Any], list[float]]:
        """Takes the most probable token so many times; returns them and the milliseconds of each step between."""
        torch, steps = self._torch, []
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        tokens = [token]
        for step in range(new_tokens - 1):
            start = time.perf_counter()
            where = torch.full((3, 1, 1), at + step)
            out = self._model(input_ids=token, position_ids=where, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            steps.append(1000 * (time.perf_counter() - start))
            tokens.append(token)
        return tokens, steps
