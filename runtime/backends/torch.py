"""transformers' own Qwen2-VL behind the protocol of base.py: the reference that anyone can call, on a CPU or on CUDA.

From pixel rows to logits every step is transformers'. This file feeds it: weights from the mapped checkpoint, pictures
one at a time, a prompt in chunks, and a KV cache that is cut back to the tokens it shares with the next prompt.

What the timeline holds is said by one immutable `_Line`, replaced when a chunk is through. A forward that was stopped
in the middle, by a cancel, a signal or for want of memory, has lengthened the caches of some layers; the next one cuts
all of them to the line first.

Letters: T tokens, D hidden size, V vocabulary.
"""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.utils import is_flash_attn_2_available

from ..errors import Cancelled, MigicianError, ModelFileError, OutOfMemory, UnsupportedError
from ..files.checkpoint import Checkpoint, canonical_name
from ..files.config import ModelConfig
from ..files.tensors import Tensor
from ..image import patchify
from ..prompt import rope_positions
from .base import Options

__all__ = ["VERIFY_ROWS", "Embeddings", "Torch", "open_engine"]

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"transformers {transformers.__version__} is installed, 5 or newer is needed")

VERIFY_ROWS = 8  # most tokens of one verify in fp32
_CHUNK = 512  # tokens of a prompt that go through the layers together: what a cancel waits for is a layer of them
_LOGIT_ROWS = 64  # rows of logits at a time: 39 MB for a vocabulary of 152064
_TORCH_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F64": torch.float64}
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "ALLOC_FAILED")
_CACHE_WORD = "cache" if "cache" in signature(Qwen2VLModel.forward).parameters else "past_key_values"
_VISION_THETA = 10000.0  # the only one before transformers knew of it as a setting
_DAMAGED = "weights are damaged; take the checkpoint anew"


@dataclass(frozen=True, eq=False)
class Embeddings:
    """One encoded picture: values[tokens, D] on the engine's device; grid is its rows and columns of cells."""

    values: torch.Tensor
    grid: tuple[int, int]
    serial: int

    @property
    def tokens(self) -> int:
        """Cells that it takes in a prompt."""
        return self.values.shape[0]

    @property
    def bytes(self) -> int:
        """Of the values."""
        return self.values.nbytes


@dataclass(frozen=True, eq=False)
class _Line:
    """The tokens that are through. ids: i64[T].   pictures: i64[T], the serial of each token's picture, 0 for text.

    position: of the token to come.   logits: f32[V] after the last token, None where they are not known.
    """

    ids: np.ndarray
    pictures: np.ndarray
    position: int
    logits: torch.Tensor | None

    def followed_by(self, ids: np.ndarray, logits: torch.Tensor) -> "_Line":
        """The line with text tokens behind it."""
        pictures = np.concatenate([self.pictures, np.zeros_like(ids)])
        return _Line(np.concatenate([self.ids, ids]), pictures, self.position + len(ids), logits)


_EMPTY = _Line(np.empty(0, np.int64), np.empty(0, np.int64), 0, None)


class _Stop:
    """The cancel flag. No engine behind it: a hook that knew one would keep it alive in a circle."""

    def __init__(self) -> None:
        self.wanted = False

    def poll(self, *_: Any) -> None:
        """Raises Cancelled once for every cancel; a hook before each layer."""
        if self.wanted:
            self.wanted = False
            raise Cancelled("cancelled")


class _Unallocated(TorchFunctionMode):
    """Modules made under it get parameters without memory; buffers, which no checkpoint holds, get their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class Torch:
    """One model and one timeline. Memory for the timeline comes and goes with its tokens.

    verify_rows: 1 in bf16, where the rounding of a row depends on the rows beside it, and with it a close choice.
    """

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        if options.threads > 0:
            torch.set_num_threads(options.threads)
        self._config, self._preprocessor = checkpoint.config, checkpoint.preprocessor
        self._dtype = torch.float32 if options.fp32 else torch.bfloat16
        self.verify_rows = VERIFY_ROWS if options.fp32 else 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on drivers that it cannot use and arrays that are read-only
            self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self._attention = _attention(self._device, self._dtype)
            with _memory(f"the weights on {self._device}", "free some, or use a smaller model"):
                self._model = _load(checkpoint, self._device, self._dtype, self._attention)
        self._stop, self._serials = _Stop(), itertools.count(1)
        for layer in (*self._model.model.visual.blocks, *self._model.model.language_model.layers):
            layer.register_forward_pre_hook(self._stop.poll)
        self._line, self._cache = _EMPTY, DynamicCache()

    @property
    def weights_bytes(self) -> int:
        """Of all parameters; those that lie in a mapped file count too."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    @property
    def versions(self) -> dict[str, str]:
        """Which packages compute, where, in which type, with which attention."""
        cuda = self._device.type == "cuda"
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": f"cuda ({torch.cuda.get_device_name(self._device)})" if cuda else "cpu",
            "dtype": str(self._dtype).removeprefix("torch."),
            "attention": self._attention,
        }

    def grow(self, tokens: int) -> None:
        """Does nothing: the cache grows with the timeline."""

    def encode(self, rgb: np.ndarray) -> Embeddings:
        """As Engine.encode. Raises ModelFileError for values that are not finite, OutOfMemory, Cancelled."""
        rows, columns = self._preprocessor.grid(*rgb.shape[:2])
        merge = self._preprocessor.merge_size
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # cuDNN rounds fp32 convolutions otherwise
        with _memory("a picture", "give smaller ones (--max-side)"), torch.inference_mode(), exact:
            patches = torch.from_numpy(patchify(rgb, self._preprocessor)).to(self._device)
            grid = torch.tensor([[1, rows * merge, columns * merge]], device=self._device)
            values = self._model.model.visual(patches, grid_thw=grid).pooler_output
            if not bool(values.isfinite().all()):
                raise ModelFileError(f"the vision encoder's output is not finite: its {_DAMAGED}")
        return Embeddings(values, (rows, columns), next(self._serials))

    def sync(self, ids: Sequence[int], pictures: Sequence[Embeddings]) -> int:
        """As Engine.sync. Raises MigicianError for pictures that do not match the tokens; the timeline is kept then."""
        tokens = self._tokens(ids)
        positions = rope_positions(tokens, [picture.grid for picture in pictures], image_token=self._config.image_token)
        owners = np.zeros_like(tokens)
        serials = [np.full(picture.tokens, picture.serial) for picture in pictures]
        owners[tokens == self._config.image_token] = np.concatenate([np.empty(0, np.int64), *serials])
        kept = _common(self._line, tokens, owners)
        if kept == len(tokens) == len(self._line.ids) and self._line.logits is not None:
            return kept
        kept = min(kept, len(tokens) - 1)  # the last token is computed in any case, for its logits
        self._line = _Line(tokens[:kept], owners[:kept], 0, None)
        with self._computing(len(tokens)):
            cells = torch.cat([picture.values for picture in pictures]) if pictures else None
            for at in range(kept, len(tokens), _CHUNK):
                stop = min(at + _CHUNK, len(tokens))
                embeds, is_cell = self._embed(tokens[at:stop]), owners[at:stop] > 0
                if cells is not None:
                    first = np.count_nonzero(owners[:at])
                    here = torch.from_numpy(is_cell).to(self._device)
                    embeds[here] = cells[first : first + np.count_nonzero(is_cell)]
                hidden = self._forward(embeds, positions[:, at:stop])
                logits = self._logits(hidden[-1:])[0] if stop == len(tokens) else None
                self._line = _Line(tokens[:stop], owners[:stop], int(positions[:, :stop].max()) + 1, logits)
        return kept

    def append(self, ids: Sequence[int], *, logprobs: bool = False) -> np.ndarray | None:
        """As Engine.append."""
        tokens = self._text(ids)
        scores = np.empty(len(tokens), np.float32) if logprobs else None
        with self._computing(len(self._line.ids) + len(tokens)):
            for at in range(0, len(tokens), _CHUNK):
                chunk = tokens[at : at + _CHUNK]
                before = self._after()
                hidden = self._follow(chunk)
                if scores is not None:
                    scores[at] = torch.log_softmax(before, -1)[chunk[0]].item()
                    for i in range(0, len(chunk) - 1, _LOGIT_ROWS):
                        coming = torch.from_numpy(chunk[i + 1 : i + 1 + _LOGIT_ROWS]).to(self._device)[:, None]
                        rows = torch.log_softmax(self._logits(hidden[i : i + len(coming)]), -1)
                        scores[at + i + 1 : at + i + 1 + len(coming)] = rows.gather(1, coming)[:, 0].cpu().numpy()
                self._line = self._line.followed_by(chunk, self._logits(hidden[-1:])[0])
        return scores

    def greedy(self, repetition_penalty: float = 1.0) -> tuple[int, float]:
        """As Engine.greedy."""
        _check_penalty(repetition_penalty)
        with self._computing(len(self._line.ids)):
            return self._choose(self._after(), self._line.ids, repetition_penalty)

    def verify(self, ids: Sequence[int], repetition_penalty: float = 1.0) -> list[tuple[int, float]]:
        """As Engine.verify."""
        _check_penalty(repetition_penalty)
        tokens, line = self._text(ids), self._line
        found: list[tuple[int, float]] = []
        with self._computing(len(line.ids) + len(tokens)):
            logits = self._logits(self._follow(tokens))
            for n in range(1, len(tokens) + 1):
                found.append(self._choose(logits[n - 1], np.concatenate([line.ids, tokens[:n]]), repetition_penalty))
                if n < len(tokens) and tokens[n] != found[-1][0]:
                    break
            self._line = line.followed_by(tokens[: len(found)], logits[len(found) - 1])
        return found

    def cancel(self) -> None:
        """As Engine.cancel; on CUDA, work that is already queued there ends first."""
        self._stop.wanted = True

    def after_fork(self, interrupted: bool) -> None:
        """Goes on with one thread: OpenMP's others are the parent's. CUDA itself refuses a forked child."""
        torch.set_num_threads(1)
        if interrupted:
            self._line, self._cache = _EMPTY, DynamicCache()

    def close(self) -> None:
        """Lets go of model, timeline and what torch keeps of the device's memory."""
        del self._model, self._line, self._cache
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _tokens(self, ids: Sequence[int]) -> np.ndarray:
        tokens, vocab = np.asarray(ids, np.int64), self._config.text.vocab
        if not len(tokens):
            raise MigicianError("no tokens given; give at least one")
        if bad := [token for token in tokens.tolist() if not 0 <= token < vocab]:
            raise MigicianError(f"token {bad[0]} is outside the vocabulary of {vocab}; use the model's own tokenizer")
        return tokens

    def _text(self, ids: Sequence[int]) -> np.ndarray:
        """Tokens that may stand behind a prompt."""
        tokens = self._tokens(ids)
        self._after()
        if (tokens == self._config.image_token).any():
            raise MigicianError(
                f"token {self._config.image_token} is a picture's place, no text; leave it out, or ask in other words"
            )
        return tokens

    def _after(self) -> torch.Tensor:
        """Logits behind the timeline, f32[V]."""
        if self._line.logits is None:
            raise MigicianError("the timeline holds no prompt; call sync first")
        return self._line.logits

    @contextmanager
    def _computing(self, tokens: int) -> Iterator[None]:
        """Work on a timeline that may become so long; where memory ends, the timeline is given up."""
        try:
            with _memory(f"{tokens} tokens", "ask for fewer or smaller pictures (--max-side)"), torch.inference_mode():
                yield
        except OutOfMemory:
            self._line, self._cache = _EMPTY, DynamicCache()
            raise

    def _embed(self, tokens: np.ndarray) -> torch.Tensor:
        return self._model.get_input_embeddings()(torch.from_numpy(tokens).to(self._device))

    def _follow(self, tokens: np.ndarray) -> torch.Tensor:
        """Takes text behind the timeline through the layers; the caller lengthens the line."""
        at = self._line.position
        return self._forward(self._embed(tokens), np.tile(np.arange(at, at + len(tokens)), (3, 1)))

    def _forward(self, embeds: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
        """embeds: [T, D] behind the line.   positions: int[3, T].   Returns the normed result, [T, D]."""
        self._cut()
        where = torch.from_numpy(positions.astype(np.int64)).to(self._device)[:, None]
        cache = {_CACHE_WORD: self._cache}
        found = self._model.model(inputs_embeds=embeds[None], position_ids=where, use_cache=True, **cache)
        return found.last_hidden_state[0]

    def _cut(self) -> None:
        """Brings every layer's cache to the length of the line, whatever was stopped in the middle of what."""
        length = len(self._line.ids)
        if not length:
            self._cache = DynamicCache()
            return
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [n, D].   Returns f32[n, V]. Raises ModelFileError where they are not finite."""
        logits = self._model.lm_head(hidden).float()
        if not bool(logits.isfinite().all()):
            raise ModelFileError(f"the logits are not finite: the model's {_DAMAGED}")
        return logits

    def _choose(self, logits: torch.Tensor, seen: np.ndarray, penalty: float) -> tuple[int, float]:
        """The first of the largest of f32[V] after the penalty on seen tokens, and its log-probability without."""
        scores = logits
        if penalty != 1.0:
            at = torch.from_numpy(seen).to(self._device)
            old, scores = logits[at], logits.clone()
            scores[at] = torch.where(old > 0, old / penalty, old * penalty)  # a token seen twice is punished once
        token = int(scores.argmax())
        return token, torch.log_softmax(logits, -1)[token].item()


def open_engine(checkpoint: Checkpoint, options: Options) -> Torch:
    """Opens an unquantized checkpoint in transformers, on CUDA where torch finds it.

    Raises UnsupportedError for a quantized one or a geometry that transformers does not have, OutOfMemory.
    """
    if checkpoint.quantization is not None:
        raise UnsupportedError(
            "quantized weights, which backend torch does not read; use backend native, or give the bf16 checkpoint"
        )
    return Torch(checkpoint, options)


def _common(line: _Line, tokens: np.ndarray, owners: np.ndarray) -> int:
    """How many tokens of a prompt the line begins with."""
    n = min(len(tokens), len(line.ids))
    differs = np.flatnonzero((tokens[:n] != line.ids[:n]) | (owners[:n] != line.pictures[:n]))
    return int(differs[0]) if len(differs) else n


def _check_penalty(penalty: float) -> None:
    if not penalty > 0:
        raise MigicianError(f"a repetition penalty of {penalty:g}; give a number above 0")


@contextmanager
def _memory(what: str, advice: str) -> Iterator[None]:
    """Turns torch's and numpy's ways of saying that memory has ended into OutOfMemory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise OutOfMemory(f"no memory for {what}; {advice}") from None


def _attention(device: torch.device, dtype: torch.dtype) -> str:
    """flash-attn takes no fp32 and runs on CUDA alone, from Ampere on."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa"
    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    """transformers' model with the checkpoint's weights: on the CPU in their own type they stay in the mapped file."""
    config = _transformers_config(checkpoint.config, attention)
    with _Unallocated():
        model = Qwen2VLForConditionalGeneration(config)
    made = {}
    for name, tensor in checkpoint.tensors.items():
        made[name] = _tensor(tensor, device, dtype)
        if made[name].data_ptr() != tensor.data.ctypes.data:  # a copy: the file's pages would stay beside it
            for file in checkpoint.files:
                file.release()
    if checkpoint.config.text.tied:
        made["lm_head.weight"] = made["model.embed_tokens.weight"]
    # the names of the transformers that is installed, found by what they are in the published layout
    model.load_state_dict({name: made[canonical_name(name)] for name in model.state_dict()}, assign=True)
    model.tie_weights()
    return model.to(device).requires_grad_(False).eval()


def _tensor(stored: Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    values = torch.from_numpy(stored.data).view(_TORCH_DTYPES[stored.dtype])
    return values.reshape(stored.shape).to(device, dtype)


def _transformers_config(config: ModelConfig, attention: str) -> Qwen2VLConfig:
    """The geometry in transformers' words. Raises UnsupportedError for what they cannot say."""
    t, v = config.text, config.vision
    if t.head_dim * t.heads != t.hidden or v.mlp_dim % v.embed_dim:
        raise UnsupportedError("heads or a vision MLP of a width that transformers lacks; use backend native")
    if v.rope_theta != _VISION_THETA and not hasattr(Qwen2VLVisionConfig, "default_rope_type"):
        raise UnsupportedError(f"a vision rope_theta of {v.rope_theta:g}; install a newer transformers")
    text = {
        "hidden_size": t.hidden,
        "num_hidden_layers": t.layers,
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv_heads,
        "intermediate_size": t.intermediate,
        "vocab_size": t.vocab,
        "bos_token_id": None,  # transformers remarks on its own defaults where a vocabulary is smaller
        "eos_token_id": None,
        "rms_norm_eps": t.rms_eps,
        "max_position_embeddings": t.max_positions,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": t.rope_theta,
            "mrope_section": list(t.mrope_section),
        },
    }
    vision: dict[str, Any] = {
        "depth": v.depth,
        "embed_dim": v.embed_dim,
        "hidden_size": v.out_dim,
        "num_heads": v.heads,
        "mlp_ratio": v.mlp_dim // v.embed_dim,
        "in_channels": v.in_channels,
        "patch_size": v.patch_size,
        "spatial_merge_size": v.merge_size,
        "temporal_patch_size": v.temporal_patch_size,
    }
    if v.rope_theta != _VISION_THETA:
        vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": v.rope_theta}
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=config.image_token,
        video_token_id=config.video_token,
        vision_start_token_id=config.vision_start_token,
        vision_end_token_id=config.vision_end_token,
        tie_word_embeddings=t.tied,
        attn_implementation=attention,
    )
