"""Times one question about several pictures in this runtime and in transformers, each in a process of its own.

    python -m migician.bench.against_transformers --model FOLDER --pictures 4 --size 640x480 --new-tokens 16

Both sides get the same noise pictures, the same prompt ids and the same number of new tokens, on the same threads, one
after the other. transformers encodes all pictures in one call, as its generate() does; prefill and single steps are
timed apart. The last line on stdout is one JSON object.
"""

import json
import resource
import subprocess
import sys
import time
from typing import Any

import click
import numpy as np

PROMPT = "the common object in all these images"


def pictures(count: int, width: int, height: int) -> list[np.ndarray]:
    """Draws `count` noise pictures, u8[height, width, 3]."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (height, width, 3), np.uint8) for _ in range(count)]


def _ms(start: float) -> float:
    return round(1000 * (time.perf_counter() - start), 1)


def run_ours(model: str, images: list[np.ndarray], new_tokens: int, threads: int, dtype: str) -> dict[str, Any]:
    """Times this runtime; dtype "float32" asks for --precision fp32."""
    from ..runtime.model import load

    start = time.perf_counter()
    with load(model, threads=threads, precision="fp32" if dtype == "float32" else "auto") as loaded:
        opened = _ms(start)
        stats = loaded.ground(images, PROMPT, max_new_tokens=new_tokens, repetition_penalty=1.0).stats
    return {"load_ms": opened, **stats}


def run_transformers(model: str, images: list[np.ndarray], new_tokens: int, threads: int, dtype: str) -> dict[str, Any]:
    """Times transformers' Qwen2-VL with sdpa attention and its KV cache."""
    import torch
    from PIL import Image
    from transformers import Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from ..runtime.checkpoint import open_checkpoint
    from ..runtime.prompt import Vocabulary, build_prompt

    torch.set_num_threads(threads)
    start = time.perf_counter()
    reference = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    stats: dict[str, Any] = {"load_ms": _ms(start)}
    with open_checkpoint(model) as checkpoint:
        vocabulary = Vocabulary(checkpoint.tokenizer_json)
    start = time.perf_counter()
    got = Qwen2VLImageProcessorPil.from_pretrained(model)([Image.fromarray(i) for i in images], return_tensors="pt")
    stats["preprocess_ms"] = _ms(start)
    grids = got["image_grid_thw"]
    ids = torch.tensor([build_prompt(vocabulary, PROMPT, [int(t * h * w) // 4 for t, h, w in grids])])
    with torch.no_grad():
        start = time.perf_counter()
        cells = reference.model.visual(got["pixel_values"].to(reference.dtype), grid_thw=grids).pooler_output
        stats["vision_ms"] = _ms(start)
        kinds = (ids == reference.config.image_token_id).int()
        positions, _ = reference.model.get_rope_index(ids, kinds, image_grid_thw=grids)
        embeds = reference.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(kinds.bool()[..., None], cells.to(embeds.dtype))
        start = time.perf_counter()
        out = reference(inputs_embeds=embeds, position_ids=positions, use_cache=True, logits_to_keep=1)
        stats["prefill_ms"] = _ms(start)
        at = int(positions.max()) + 1
        start = time.perf_counter()
        for step in range(new_tokens - 1):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            where = torch.full((3, 1, 1), at + step)
            out = reference(input_ids=token, position_ids=where, past_key_values=out.past_key_values, use_cache=True)
        stats["decode_ms"] = _ms(start)
    stats["new_tokens"] = new_tokens
    stats["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    return stats


def _measure(side: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "migician.bench.against_transformers", "--side", side, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@click.command(help=__doc__)
@click.option("--model", required=True, help="Hugging Face folder that both sides load.")
@click.option("--pictures", "count", default=4, show_default=True)
@click.option("--size", default="640x480", show_default=True, help="Width x height of every picture.")
@click.option("--new-tokens", default=16, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float32"]))
@click.option("--side", type=click.Choice(["ours", "transformers", "both"]), default="both", show_default=True)
def main(model: str, count: int, size: str, new_tokens: int, threads: int, dtype: str, side: str) -> None:
    """Prints both sides' phases and their ratios."""
    width, height = (int(n) for n in size.split("x"))
    if side != "both":
        run = run_ours if side == "ours" else run_transformers
        print(json.dumps(run(model, pictures(count, width, height), new_tokens, threads, dtype)))
        return
    arguments = ["--model", model, "--pictures", str(count), "--size", size, "--new-tokens", str(new_tokens)]
    arguments += ["--threads", str(threads), "--dtype", dtype]
    ours, theirs = _measure("ours", arguments), _measure("transformers", arguments)
    for key in ("vision_ms", "prefill_ms", "decode_ms", "peak_rss_mb"):
        ratio = theirs[key] / ours[key] if ours[key] else float("inf")
        click.echo(f"{key:12} ours {ours[key]:10.1f}   transformers {theirs[key]:10.1f}   ratio {ratio:.2f}", err=True)
    print(json.dumps({"ours": ours, "transformers": theirs, "dtype": dtype, "pictures": count, "size": size}))


if __name__ == "__main__":
    main()
