"""From a training state to the Hugging Face folder of the published layout, and to runtime/nano.mig.

python -m migician.train.nano.export STATE -o FOLDER [--mig FILE]
"""

import json
from pathlib import Path
from typing import Any

import click

from ...runtime.chat_template import CHAT_TEMPLATE
from ...runtime.files.config import CLIP_MEAN, CLIP_STD
from ...runtime.files.write import whole_file
from .model import NanoConfig
from .state import State, load_state
from .vocabulary import IMAGE, PAD, SPECIAL, VISION_END, VISION_START, Vocabulary

__all__ = ["export_folder", "export_mig"]

# Any square picture becomes 7 x 7 cells of 28 px, as in training; other shapes about as many.
_MIN_PIXELS, _MAX_PIXELS = 36000, 40000
_END = SPECIAL.index("<|im_end|>")


def hf_config(c: NanoConfig) -> dict[str, Any]:
    """config.json in the flat form of transformers 4.45."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "torch_dtype": "bfloat16",
        "hidden_size": c.dim, "intermediate_size": c.intermediate, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "hidden_act": "silu",
        "vocab_size": c.vocab, "max_position_embeddings": 4096, "rms_norm_eps": c.eps, "tie_word_embeddings": True,
        "rope_theta": c.rope_theta, "rope_scaling": {"type": "mrope", "mrope_section": list(c.mrope_section)},
        "use_sliding_window": False, "attention_dropout": 0.0, "use_cache": True,
        "bos_token_id": PAD, "eos_token_id": _END, "pad_token_id": PAD,
        "image_token_id": IMAGE, "video_token_id": c.vocab - 1,
        "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
        "vision_config": {
            "model_type": "qwen2_vl", "depth": c.vision_depth, "embed_dim": c.vision_dim, "hidden_size": c.dim,
            "num_heads": c.vision_heads, "mlp_ratio": c.vision_mlp, "in_chans": 3, "in_channels": 3, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_act": "quick_gelu",
        },
    }  # fmt: skip


def _preprocessor() -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
        "min_pixels": _MIN_PIXELS, "max_pixels": _MAX_PIXELS, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }  # fmt: skip


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<|unk|>", "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>", "clean_up_tokenization_spaces": False, "model_max_length": 4096,
        "extra_special_tokens": {"image_token": "<|image_pad|>"}, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip


def published_name(name: str) -> str:
    """A parameter's name in the published layout."""
    return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)


def export_folder(state: State, folder: Path) -> None:
    """Writes a Hugging Face folder, weights in bf16, loadable by transformers and by migician alike.

    Each of its files is whole at any moment. Raises ModelFileError where they cannot be written.
    """
    import torch
    from safetensors.torch import save

    generation = {"do_sample": False, "repetition_penalty": 1.0, "bos_token_id": PAD, "pad_token_id": PAD}
    texts = {
        "config.json": hf_config(state.config),
        "generation_config.json": {**generation, "eos_token_id": [_END]},
        "preprocessor_config.json": _preprocessor(),
        "tokenizer_config.json": _tokenizer_config(),
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }
    weights = {published_name(name): t.to(torch.bfloat16).contiguous() for name, t in state.model.items()}
    files = {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in texts.items()}
    files["tokenizer.json"] = Vocabulary(state.pieces).tokenizer_json().encode()
    files["model.safetensors"] = save(weights, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with whole_file(folder / name) as file:
            file.write(content)


def export_mig(folder: Path, path: Path, extra: dict[str, str] | None = None) -> None:
    """Writes a Hugging Face folder as one .mig file."""
    from ...runtime.files.mig import write_mig
    from ...runtime.files.open import open_checkpoint

    with open_checkpoint(folder) as checkpoint:
        write_mig(path, checkpoint, extra=extra)


@click.command()
@click.argument("state", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="folder to write")
@click.option("--mig", type=click.Path(dir_okay=False, path_type=Path), help="also write this .mig file")
def main(state: Path, out: Path, mig: Path | None) -> None:
    """Exports a training STATE as a Hugging Face folder, and as a .mig file."""
    loaded = load_state(state)
    export_folder(loaded, out)
    if mig is not None:
        export_mig(out, mig, {"history": json.dumps(loaded.history)})
    click.echo(str(mig or out))


if __name__ == "__main__":
    main()
