"""transformers' Qwen2-VL as the independent truth: pictures to ask about, and its log-probabilities."""

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["draw", "reference_logprobs"]


def draw(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for w, h in sizes]


def reference_logprobs(reference, folder: Path, ids, pictures):
    """Returns f32[len(ids), vocab] by transformers' own picture path and forward."""
    import torch

    inputs = {"input_ids": torch.tensor([ids])}
    if pictures:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        got = processor(images=pictures, return_tensors="pt")
        inputs |= {"pixel_values": got["pixel_values"], "image_grid_thw": got["image_grid_thw"]}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == reference.config.image_token_id).int()
    with torch.no_grad():
        return torch.log_softmax(reference(**inputs).logits[0].float(), -1).numpy()
