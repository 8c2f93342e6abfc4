"""The C core as Python objects: Pool, Weights, Vision, Session; and Native, the engine made of them.

Every call releases the GIL. Ctrl-C reaches a running call through a poll function that the core calls between layers.
"""

import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np

from .._migi import ffi, lib
from ..cores import usable_cores
from ..errors import Cancelled, ContextFullError, MigicianError, ModelFileError, OutOfMemory, UnsupportedError
from ..files.checkpoint import Checkpoint
from ..files.tensors import Tensor
from .base import Options

__all__ = [
    "VERIFY_ROWS",
    "Native",
    "Pool",
    "Session",
    "Vision",
    "Weights",
    "integer_sums",
    "kernel_report",
    "measure_ceilings",
    "open_engine",
    "patchify",
    "positions",
]

VERIFY_ROWS: int = lib.MIGI_VERIFY_ROWS  # most tokens of one Session.verify

# Tokens a session has room for from the start: several pictures and some turns about them. Memory is taken only as they
# come (about 29 KB each for the 2B model, 57 for the 7B), so room costs nothing, and growing beyond it is rare.
_ROOMY_CONTEXT = 8192
_CONTEXT_STEP = 256

_ERRORS: dict[int, type[MigicianError]] = {
    lib.MIGI_E_MODEL: ModelFileError,
    lib.MIGI_E_CONTEXT_FULL: ContextFullError,
    lib.MIGI_E_MEMORY: OutOfMemory,
    lib.MIGI_E_UNSUPPORTED: UnsupportedError,
    lib.MIGI_E_CANCELLED: Cancelled,
    lib.MIGI_E_NUMERIC: ModelFileError,
}
_DTYPES = {"BF16": lib.MIGI_BF16, "F32": lib.MIGI_F32, "I8": lib.MIGI_I8, "U8": lib.MIGI_U8}
_raised = threading.local()


def _remember(kind: type[BaseException], error: BaseException, trace: TracebackType) -> None:
    """Keeps what a signal handler raised inside the poll, to raise it again once the core has returned."""
    _raised.error = error


@ffi.def_extern(error=1, onerror=_remember)
def migi_poll_signals(arg: Any) -> int:
    """Lets Python run pending signal handlers; an exception there stops the core's work."""
    for _ in (0,):  # the backward jump is where every CPython from 3.10 on looks for signals
        pass
    return 0


def _check(status: int, err: Any) -> None:
    """Raises what a migi_status stands for."""
    pending = getattr(_raised, "error", None)
    if pending is not None:
        _raised.error = None
        raise pending
    if status != lib.MIGI_OK:
        raise _ERRORS.get(status, MigicianError)(ffi.string(err.message).decode(errors="replace"))


def kernel_report() -> str:
    """Returns one line per instruction set: whether it can run here, and whose functions serve each kind of work."""
    size = lib.migi_kernel_report(ffi.NULL, 0)
    text = ffi.new("char[]", size + 1)
    lib.migi_kernel_report(text, size + 1)
    return ffi.string(text).decode()


class Pool:
    """Threads and the kernels chosen for this CPU (or named by MIGICIAN_ISA)."""

    def __init__(self, threads: int = 0) -> None:
        out, err = ffi.new("migi_pool **"), ffi.new("migi_error *")
        isa = os.environ.get("MIGICIAN_ISA", "").encode()
        _check(lib.migi_pool_new(out, threads or usable_cores(), isa or ffi.NULL, err), err)
        self.handle = ffi.gc(out[0], lib.migi_pool_free)
        self.threads: int = lib.migi_pool_threads(self.handle)
        self.isa: str = ffi.string(lib.migi_pool_isa(self.handle)).decode()

    def restart(self) -> None:
        """Starts the threads anew in a forked child, where the parent's are not."""
        lib.migi_pool_restart(self.handle)
        self.threads = lib.migi_pool_threads(self.handle)


def _config(checkpoint: Checkpoint) -> Any:
    text, vision, pre = checkpoint.config.text, checkpoint.config.vision, checkpoint.preprocessor
    c = ffi.new("migi_config *")
    c.layers, c.hidden, c.intermediate, c.vocab = text.layers, text.hidden, text.intermediate, text.vocab
    c.heads, c.kv_heads, c.head_dim, c.tied = text.heads, text.kv_heads, text.head_dim, int(text.tied)
    c.mrope_section = list(text.mrope_section)
    c.rms_eps, c.rope_theta, c.image_token = text.rms_eps, text.rope_theta, checkpoint.config.image_token
    c.v_depth, c.v_dim, c.v_heads, c.v_mlp = vision.depth, vision.embed_dim, vision.heads, vision.mlp_dim
    c.patch, c.merge, c.temporal = vision.patch_size, vision.merge_size, vision.temporal_patch_size
    c.channels, c.v_rope_theta = vision.in_channels, vision.rope_theta
    c.mean, c.std = list(pre.mean), list(pre.std)
    return c


def _fill(slot: Any, name: str, tensor: Tensor) -> list[Any]:
    """Describes one tensor to the core; returns what must outlive the description."""
    keep = [ffi.new("char[]", name.encode()), ffi.from_buffer(tensor.data)]
    slot.name, slot.data, slot.bytes = keep[0], ffi.cast("void *", keep[1]), tensor.nbytes
    slot.dtype, slot.rank = _DTYPES.get(tensor.dtype, 0), len(tensor.shape)
    for i, n in enumerate(tensor.shape[:5]):
        slot.shape[i] = n
    return keep


class Weights:
    """A checkpoint bound to the core; keeps the mapped file alive.

    bytes: size of the weights as stored, quantized ones with their scales and factors.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = _config(checkpoint)
        keep: list[Any] = []
        tensors = ffi.new("migi_tensor[]", max(1, len(checkpoint.tensors)))
        for slot, (name, tensor) in zip(tensors, checkpoint.tensors.items(), strict=False):
            keep += _fill(slot, name, tensor.served())
        out, err = ffi.new("migi_model **"), ffi.new("migi_error *")
        _check(lib.migi_model_new(out, self.config, tensors, len(checkpoint.tensors), err), err)
        self._keep = keep
        self.handle = ffi.gc(out[0], lib.migi_model_free)
        self.bytes: int = lib.migi_model_bytes(self.handle)


class Vision:
    """One encoded picture, usable in every session of the same weights.

    bytes: size of its embeddings.
    """

    def __init__(self, handle: Any, hidden: int) -> None:
        self.handle, self._hidden = handle, hidden
        self.tokens: int = lib.migi_vision_tokens(handle)
        self.bytes = self.tokens * hidden * 4

    def embeddings(self) -> np.ndarray:
        """Returns a copy, f32[tokens, hidden]."""
        data = lib.migi_vision_embeddings(self.handle)
        size = self.tokens * self._hidden
        return np.frombuffer(ffi.buffer(data, size * 4), np.float32).reshape(self.tokens, self._hidden).copy()


class Session:
    """One timeline of tokens with its KV cache; one thread at a time, cancel() from any."""

    def __init__(self, weights: Weights, pool: Pool, *, context: int, fp32: bool = False) -> None:
        self.weights, self.pool, self.context = weights, pool, context
        options = self._options = ffi.new("migi_session_options *")
        options.context, options.fp32, options.poll = context, int(fp32), lib.migi_poll_signals
        self._err = ffi.new("migi_error *")
        self._verified = ffi.new("int32_t *"), ffi.new("int32_t[]", VERIFY_ROWS), ffi.new("float[]", VERIFY_ROWS)
        out = ffi.new("migi_session **")
        _check(lib.migi_session_new(out, weights.handle, pool.handle, options, self._err), self._err)
        self.handle = ffi.gc(out[0], lib.migi_session_free)

    def encode(self, rgb: np.ndarray) -> Vision:
        """Encodes u8[H, W, 3], both sides multiples of a merged cell."""
        rgb = np.ascontiguousarray(rgb, np.uint8)
        out = ffi.new("migi_vision **")
        data = ffi.from_buffer("uint8_t[]", rgb)
        _check(lib.migi_vision_encode(out, self.handle, data, rgb.shape[0], rgb.shape[1], self._err), self._err)
        return Vision(ffi.gc(out[0], lib.migi_vision_free), self.weights.config.hidden)

    def sync(self, ids: Sequence[int], visions: Sequence[Vision]) -> int:
        """Makes the timeline hold exactly these tokens; returns how many of them did not have to be computed."""
        tokens = ffi.new("int32_t[]", list(ids))
        pictures = ffi.new("migi_vision *[]", [v.handle for v in visions])
        _check(lib.migi_session_sync(self.handle, tokens, len(ids), pictures, len(visions), self._err), self._err)
        return lib.migi_session_kept(self.handle)

    def append(self, ids: Sequence[int], *, logprobs: bool = False) -> np.ndarray | None:
        """Appends text tokens; with logprobs, returns f32[len(ids)], each token's natural log-probability."""
        out = np.empty(len(ids), np.float32) if logprobs else None
        data = ffi.NULL if out is None else ffi.from_buffer("float[]", out, require_writable=True)
        _check(
            lib.migi_session_append(self.handle, ffi.new("int32_t[]", list(ids)), len(ids), data, self._err), self._err
        )
        return out

    def greedy(self, repetition_penalty: float = 1.0) -> tuple[int, float]:
        """Returns the most probable next token and its log-probability without the penalty."""
        token, logprob = ffi.new("int32_t *"), ffi.new("float *")
        _check(lib.migi_session_greedy(self.handle, repetition_penalty, token, logprob, self._err), self._err)
        return token[0], logprob[0]

    def verify(self, ids: Sequence[int], repetition_penalty: float = 1.0) -> list[tuple[int, float]]:
        """Appends ids[0] and as many of the guesses behind it as are the greedy choice, in one pass.

        ids: at most VERIFY_ROWS.   Returns the greedy choice after each appended token, with its log-probability: the
        guesses that came true, and the next token, which is not on the timeline yet.
        """
        kept, choices, logprobs = self._verified
        tokens = ffi.new("int32_t[]", ids)
        count = len(ids)
        _check(
            lib.migi_session_verify(self.handle, tokens, count, repetition_penalty, kept, choices, logprobs, self._err),
            self._err,
        )
        return [(choices[i], logprobs[i]) for i in range(kept[0])]

    def grow(self, context: int) -> None:
        """Makes room for more tokens, keeping the timeline."""
        _check(lib.migi_session_grow(self.handle, context, self._err), self._err)
        self.context = self._options.context = max(context, self.context)

    def logits(self) -> np.ndarray:
        """Returns a copy, f32[vocab], after the last token."""
        data = lib.migi_session_logits(self.handle)
        if data == ffi.NULL:
            raise MigicianError("the session holds no prompt; call sync first")
        return np.frombuffer(ffi.buffer(data, self.weights.config.vocab * 4), np.float32).copy()

    @property
    def length(self) -> int:
        """Tokens on the timeline."""
        return lib.migi_session_length(self.handle)

    def cancel(self) -> None:
        """Stops the work of another thread in this session within one layer."""
        lib.migi_session_cancel(self.handle)

    def bytes(self) -> int:
        """Memory of a session like this one."""
        return lib.migi_session_bytes(self.weights.handle, self.pool.handle, self._options)


class Native:
    """The C core behind the protocol of base.py: one model, one session whose room grows as prompts need it."""

    verify_rows = VERIFY_ROWS

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        self._pool = Pool(options.threads)
        self._weights = Weights(checkpoint)
        self._fp32, self._most = options.fp32, checkpoint.config.text.max_positions
        self._session: Session | None = None
        self._cancelled = False  # before there was a session

    @property
    def weights_bytes(self) -> int:
        """Of the weights as stored."""
        return self._weights.bytes

    @property
    def versions(self) -> dict[str, str]:
        """Which kernels compute."""
        return {"kernels": self._pool.isa}

    def grow(self, tokens: int) -> None:
        """Makes room for so many tokens, and at once for at least twice as many as there was room for."""
        session = self._session
        room = 2 * session.context if session else _ROOMY_CONTEXT
        room = min(max(-(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP, room), max(tokens, self._most))
        try:
            if session is None:
                self._session = self._open(room)
            elif session.context < tokens:
                session.grow(room)
        except OutOfMemory:  # less room, and not both caches at once: the old one goes, its prompt is computed again
            session = self._session = None
            self._session = self._open(tokens)

    def _open(self, context: int) -> Session:
        session = Session(self._weights, self._pool, context=context, fp32=self._fp32)
        if self._cancelled:
            self._cancelled = False
            session.cancel()
        return session

    def _opened(self) -> Session:
        if self._session is None:
            self.grow(1)
        assert self._session is not None
        return self._session

    def encode(self, rgb: np.ndarray) -> Vision:
        """As Session.encode."""
        return self._opened().encode(rgb)

    def sync(self, ids: Sequence[int], pictures: Sequence[Vision]) -> int:
        """As Session.sync."""
        return self._opened().sync(ids, pictures)

    def append(self, ids: Sequence[int], *, logprobs: bool = False) -> np.ndarray | None:
        """As Session.append."""
        return self._opened().append(ids, logprobs=logprobs)

    def greedy(self, repetition_penalty: float = 1.0) -> tuple[int, float]:
        """As Session.greedy."""
        return self._opened().greedy(repetition_penalty)

    def verify(self, ids: Sequence[int], repetition_penalty: float = 1.0) -> list[tuple[int, float]]:
        """As Session.verify."""
        return self._opened().verify(ids, repetition_penalty)

    def cancel(self) -> None:
        """As Session.cancel."""
        if self._session is None:
            self._cancelled = True
        else:
            self._session.cancel()

    def after_fork(self, interrupted: bool) -> None:
        """Starts the threads anew; a timeline that was being written is dropped."""
        if interrupted:
            self._session = None
        self._pool.restart()

    def close(self) -> None:
        """Frees session, weights and threads."""
        del self._session, self._weights, self._pool


def open_engine(checkpoint: Checkpoint, options: Options) -> Native:
    """Opens a checkpoint in the C core."""
    return Native(checkpoint, options)


def patchify(weights: Weights, rgb: np.ndarray) -> np.ndarray:
    """The core's patch matrix of u8[H, W, 3]: f32[patches, 3 * 2 * 14 * 14]."""
    c = weights.config
    height, width = rgb.shape[:2]
    out = np.empty(((height // c.patch) * (width // c.patch), c.channels * c.temporal * c.patch**2), np.float32)
    err = ffi.new("migi_error *")
    data = ffi.from_buffer("float[]", out, require_writable=True)
    rgb = np.ascontiguousarray(rgb, np.uint8)
    _check(lib.migi_patchify(c, ffi.from_buffer("uint8_t[]", rgb), height, width, data, err), err)
    return out


def positions(weights: Weights, ids: Sequence[int], grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """The core's M-RoPE positions, i32[3, T]; grids are rows and columns of merged cells."""
    out = np.empty((3, len(ids)), np.int32)
    err = ffi.new("migi_error *")
    flat = ffi.new("int32_t[]", [n for grid in grids for n in grid] or [0])
    data = ffi.from_buffer("int32_t[]", out, require_writable=True)
    _check(
        lib.migi_positions(weights.config, ffi.new("int32_t[]", list(ids)), len(ids), flat, len(grids), data, err), err
    )
    return out


def integer_sums(pool: Pool, weight: Tensor, factors: Tensor | None, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The core's integer product of x f32[T, K] with one quantized matrix: (sums i32[T, Np], scales f32[T]).

    weight: the stored int8 or int4 blocks.   factors: an int4 matrix's group factors, None for int8.
    x[t] becomes int8 by scales[t]; times scales[t] and the matrix's own scale of a row, sums are the outputs.
    Raises ModelFileError when the tensors do not fit each other or K.
    """
    x = np.ascontiguousarray(x, np.float32)
    slots, err = ffi.new("migi_tensor[2]"), ffi.new("migi_error *")
    keep = _fill(slots[0], weight.name, weight)
    if factors is not None:
        keep += _fill(slots[1], factors.name, factors)
    rows, k = x.shape
    sums = np.empty((rows, 16 * weight.shape[0] if weight.shape else 0), np.int32)
    scales = np.empty(rows, np.float32)
    group = ffi.NULL if factors is None else slots + 1
    data = ffi.from_buffer("float[]", x)
    out = ffi.from_buffer("int32_t[]", sums, require_writable=True)
    out_scales = ffi.from_buffer("float[]", scales, require_writable=True)
    _check(lib.migi_integer_sums(pool.handle, slots, group, data, rows, k, out, out_scales, err), err)
    return sums, scales


def measure_ceilings(pool: Pool, *, seconds: float = 0.3) -> dict[str, float]:
    """Measures what the machine does at most with these threads and kernels: read_bytes, f32_ops, int8_ops, bf16_ops.

    Each is per second; bf16_ops is 0 where bf16 is multiplied as float. seconds: for each of up to seven rounds.
    """
    out, err = ffi.new("migi_ceilings *"), ffi.new("migi_error *")
    _check(lib.migi_measure_ceilings(pool.handle, seconds, out, err), err)
    return {name: getattr(out, name) for name in ("read_bytes", "f32_ops", "int8_ops", "bf16_ops")}
