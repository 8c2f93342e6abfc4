"""Pictures in, resized RGB out: the integer half of what Qwen2-VL's image processor does.

A picture comes from a path, a file's bytes, a PIL image or an array (see `sources`). It is turned upright (EXIF), laid
on white where it is transparent, brought to 8-bit RGB and resized once, bicubic, to a multiple of 28 pixels per side.
Pixels equal those of transformers' `Qwen2VLImageProcessorPil` exactly; the C core does the rest (normalisation,
patches), and `patchify` is the reference that it is tested against.

Letters: H, W a picture's rows and columns in pixels; P its patches, (H / patch) * (W / patch).
Source: transformers `image_processing_pil_qwen2_vl.py`, `image_transforms.py`; `preprocessor_config.json` of Qwen2-VL.
"""

import hashlib
import io
import math
import os
import threading
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import ImageError
from .files.config import Preprocessor
from .kinds import foreign, guess, is_heic
from .metadata import orientation, without_metadata
from .sources import PictureSource, picture_name, read_source

__all__ = [
    "Picture",
    "PictureSource",
    "content_key",
    "load_picture",
    "open_picture",
    "patchify",
    "picture_name",
    "read_source",
    "smart_resize",
]

MAX_SOURCE_PIXELS = 178_956_970  # the size at which Pillow itself refuses a file: 512 MiB of RGB
MAX_ASPECT_RATIO = 200
_INTERPRETED = frozenset({"EPS", "WMF"})  # Pillow hands these to an outside interpreter: programs, not pictures
# By EXIF orientation. Not ImageOps.exif_transpose: it writes the EXIF block anew, and fails where that is damaged.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Picture:
    """A picture ready for the engine.

    rgb: u8[H, W, 3], C-contiguous, resized: H and W are multiples of the preprocessor's `factor`.
    width, height: in pixels of the picture as given, after EXIF rotation, before any resize.
    name: what messages call it.
    key: what a cache may find it by; empty where nobody asked.
    """

    rgb: np.ndarray
    width: int
    height: int
    name: str
    key: bytes = b""


def smart_resize(
    height: int, width: int, *, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 28 * 28 * 1280
) -> tuple[int, int]:
    """Finds the size to resize to: multiples of `factor`, min_pixels <= H * W <= max_pixels, the shape nearly kept.

    Returns (H, W). Python's rounding of halves to even is part of the definition: 42 becomes 56, 70 becomes 56.
    Raises ImageError when the picture is empty or more than 200 times as long as it is wide.
    Source: transformers `smart_resize`, line by line.
    """
    if min(height, width) < 1:
        raise ImageError(f"the picture is {width}x{height} pixels: nothing to see; give one with at least 1x1")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ImageError(
            f"{width}x{height} pixels: one side is over {MAX_ASPECT_RATIO} times the other; crop or pad the picture"
        )
    return _round_size(height, width, factor, min_pixels, max_pixels)


def _round_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / beta / factor) * factor)
        columns = max(factor, math.floor(width / beta / factor) * factor)
    elif rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * beta / factor) * factor
        columns = math.ceil(width * beta / factor) * factor
    return rows, columns


def load_picture(source: PictureSource, pre: Preprocessor, *, max_side: int | None = None, name: str = "") -> Picture:
    """Opens a picture and resizes it for the model.

    max_side: upper bound in pixels of the picture's longer side. The bounded size goes through `smart_resize` like a
    picture of that size, and the pixels are resized once, from the original to the result, so the longer side can end
    half a cell above it. Smaller pictures are not enlarged.
    Raises ImageError (see `open_picture`, `smart_resize`), ValueError for a max_side below 1.
    """
    if max_side is not None and max_side < 1:
        raise ValueError(f"max_side is {max_side}: give a number of pixels from 1 up")
    name = name or picture_name(source)
    image = open_picture(source, name=name)
    width, height = image.size
    try:
        rows, columns = smart_resize(
            height, width, factor=pre.factor, min_pixels=pre.min_pixels, max_pixels=pre.max_pixels
        )
    except ImageError as e:
        raise ImageError(f"{name}: {e}") from None
    if max_side is not None and max(width, height) > max_side:
        # No second look at the aspect ratio: rounding a thin side to whole pixels must not turn into a refusal.
        scale = max_side / max(width, height)
        bounded = max(1, round(height * scale)), max(1, round(width * scale))
        rows, columns = _round_size(*bounded, pre.factor, pre.min_pixels, pre.max_pixels)
    try:
        return Picture(np.array(image.resize((columns, rows), Image.Resampling.BICUBIC)), width, height, name)
    except MemoryError:
        raise ImageError(f"{name}: not enough memory to resize it; make the picture smaller first") from None


def content_key(source: PictureSource, *settings: object) -> bytes:
    """Names the content of a picture under the settings that it is read with: equal content and settings, equal key.

    source: bytes of a file, an array, or a PIL image of mode RGB or L; empty for what would have to be read to be told
    apart: a path, and PIL images that are transparent, turned by EXIF or of another mode.
    """
    kind: tuple[object, ...]
    if isinstance(source, np.ndarray):
        if source.dtype.kind not in "buif":
            return b""
        kind, content = (source.dtype.str, source.shape), np.ascontiguousarray(source).data
    elif isinstance(source, Image.Image):
        size = source.width * source.height
        if source.mode not in ("RGB", "L") or "transparency" in source.info or size > MAX_SOURCE_PIXELS:
            return b""
        try:
            if _stated_turn(source) in _TURNS:
                return b""
            kind, content = (source.mode, source.size), memoryview(source.tobytes())
        except Exception:  # a damaged file behind it: whoever decodes it next says so
            return b""
    elif isinstance(source, (bytes, bytearray, memoryview)):
        kind, content = ("file",), memoryview(source if isinstance(source, bytes) else bytes(source))
    else:
        return b""
    digest = hashlib.sha256(repr((kind, settings)).encode())
    digest.update(content)
    return digest.digest()


def open_picture(source: PictureSource, *, name: str = "") -> Image.Image:
    """Opens a picture as 8-bit RGB, upright.

    source: path, data: or file: URL; bytes of an image file, or an open one; PIL image (a multi-frame one at the frame
        it stands at, files at their first); array u8, u16 (0..65535), bool or float (0..1), of shape [H, W],
        [H, W, 1], [H, W, 3] RGB or [H, W, 4] RGBA. OpenCV's arrays are BGR: reverse their last axis first.
    Upright: the EXIF orientation is applied, to PIL images too. Transparency is laid on white. 16-bit pixels are
    scaled by 255/65535, not clipped. Wider modes (I, F) state no range: see `_narrow`. ICC profiles are ignored, as the
    reference does, except that CIELAB is converted. A file whose metadata alone is damaged or oversized is opened
    without it, still upright. HEIC needs pillow-heif, AVIF a Pillow that has it.
    Raises ImageError, one line, for whatever cannot be read: no such file, not a picture, damaged, or of more than
    178,956,970 pixels by its header, which is refused before anything is decoded.
    """
    name = name or picture_name(source)
    content = read_source(source, name=name)
    try:
        if isinstance(content, np.ndarray):
            return _flatten(_from_array(content))
        with _quiet:  # Pillow remarks on size and damaged EXIF; both are settled here
            if isinstance(content, Image.Image):
                return _from_image(content)
            return _decode(content if isinstance(content, bytes) else bytes(content))  # type: ignore[arg-type]
    except Exception as e:  # Pillow's decoders raise whatever a damaged file makes them trip over
        raise ImageError(f"{name}: {_reason(e, content)}") from None


def _reason(error: Exception, content: PictureSource) -> str:
    """Why a picture could not be opened, and what to do."""
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, UnidentifiedImageError) and isinstance(content, (bytes, bytearray, memoryview)):
        return guess(bytes(content))
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels; make the picture smaller first"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it; make the picture smaller first"
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    if isinstance(content, Image.Image) and (_is_closed(content) or "closed" in reason):
        return "its file was closed before its pixels were read; call load() on it before, or give its path"
    if "truncated" in reason.lower():
        return f"is cut off before its end ({reason}); copy or download it again"
    return f"cannot be decoded ({reason}); save the picture again, or use another file"


def _decode(data: bytes) -> Image.Image:
    """A file's bytes to upright RGB; where only the metadata is unsound, without it."""
    if not data:
        raise ImageError("the file is empty (0 bytes); check how it was written")
    if kind := foreign(data):
        raise ImageError(kind)
    try:
        return _upright(_open_file(data))
    except (ImageError, Image.DecompressionBombError, MemoryError):
        raise
    except Exception:
        bare = without_metadata(data)
        if bare is not None and bare != data:
            try:
                return _upright(_open_file(bare))
            except (ImageError, Image.DecompressionBombError, MemoryError):
                raise
            except Exception:  # more than the metadata: the first failure tells it better
                pass
        raise


def _from_image(image: Image.Image) -> Image.Image:
    """A PIL image to upright RGB; one that is not decoded yet may need its file read again, without the metadata."""
    try:
        return _upright(image)
    except (ImageError, Image.DecompressionBombError, MemoryError):
        raise
    except Exception:
        file = getattr(image, "fp", None)
        if file is None or image.tell() != 0:  # closed, or at another frame than a file's first
            raise
        file.seek(0)
        return _decode(file.read())


def _open_file(data: bytes) -> Image.Image:
    """Reads a file's header; nothing is decoded yet, except where a decoder knows no other way."""
    if is_heic(data):
        return _open_heic(data)
    image = Image.open(io.BytesIO(data))
    if image.format in _INTERPRETED:
        raise ImageError(f"{image.format} files are not read; convert it to PNG, JPEG, WebP, TIFF, BMP or GIF")
    return image


def _open_heic(data: bytes) -> Image.Image:
    try:
        import pillow_heif
    except ImportError:
        raise ImageError(
            "a HEIC picture, as phones take them; pip install pillow-heif to read it, or convert it to JPEG: "
            "heif-convert FILE picture.jpg"
        ) from None
    file = pillow_heif.open_heif(io.BytesIO(data))
    _check_size(*file.size)
    image = file.to_pillow()
    image.info = {}  # the file's own rotation is applied; its EXIF repeats it and must not be applied again
    return image


def _load(image: Image.Image) -> None:
    """Decodes an image that is already opened.

    Never Image.draft or Image.thumbnail: both let the JPEG decoder shrink by itself, with other pixels.
    """
    _check_size(*image.size)
    image.load()
    _check_size(*image.size)  # a few formats learn their true size only here


def _is_closed(image: Image.Image) -> bool:
    """Whether an opened image has lost its file before its pixels were read."""
    file = getattr(image, "fp", None)
    return bool(getattr(image, "tile", None)) and (file is None or getattr(file, "closed", False))


class _Quiet:
    """Silences warnings while any thread is inside.

    `warnings.catch_warnings` alone keeps no count: of two threads, the one that leaves last would put back the other's
    silence, for good.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._context = warnings.catch_warnings()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        """Other threads do not live on in a child, so nobody is inside there."""
        self._lock = threading.Lock()
        if self._inside:
            self._inside = 0
            self._context.__exit__(None, None, None)

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._context = warnings.catch_warnings()
                self._context.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._context.__exit__(None, None, None)


_quiet = _Quiet()


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"the picture is {width}x{height} pixels: nothing to see; give one with at least 1x1")
    if width * height > MAX_SOURCE_PIXELS:
        raise ImageError(
            f"{width}x{height} pixels is over the limit of {MAX_SOURCE_PIXELS:,}; make the picture smaller first"
        )


def _upright(image: Image.Image) -> Image.Image:
    """Image of any mode to upright RGB."""
    _load(image)
    turn = _TURNS.get(_stated_turn(image))
    rgb = _flatten(image)
    return rgb if turn is None else rgb.transpose(turn)


def _stated_turn(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 where it does not say."""
    try:
        stated = image.getexif().get(0x0112)
    except Exception:  # damaged EXIF says nothing about the pixels
        stated = None
    block = image.info.get("exif")
    if stated is None and isinstance(block, bytes):  # damaged, it may still say how they stand
        stated = orientation([block])
    return stated if isinstance(stated, int) else 1


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode to RGB, transparency onto white."""
    transparency = image.info.get("transparency")
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        narrow = Image.fromarray(_narrow(values))
        if isinstance(transparency, int):  # a 16-bit gray PNG names one value as see-through
            narrow.putalpha(Image.fromarray(np.where(values == transparency, 0, 255).astype(np.uint8)))
        narrow.info = {k: v for k, v in image.info.items() if k != "transparency"}
        image, transparency = narrow, None
    if image.mode == "LAB":
        return _from_lab(image)
    if image.mode == "La":
        image = image.convert("LA")
    if "A" in image.getbands() or "a" in image.getbands() or transparency is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        flat = Image.alpha_composite(white, image).convert("RGB")
        flat.info = image.info
        return flat
    return image.convert("RGB")


def _narrow(values: np.ndarray) -> np.ndarray:
    """Gray pixels of more than 8 bits to 8: [H, W] -> u8[H, W], scaled and never clipped.

    Modes of 32 bits state no range, so the first of these that holds every pixel is taken: 0..1 and 0..255 for floats,
    0..65535 for both (older versions of Pillow hold 16-bit pictures as integers), else its own least..greatest.
    """
    if values.dtype.kind == "u":
        return _scale16(values)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError("holds pixels that are not finite numbers; replace them first")
    if values.dtype.kind == "i" and low >= 0 and high <= 65535:
        return _scale16(values)
    if values.dtype.kind == "f" and low >= 0 and high <= 65535:
        top = 1 if high <= 1 else 255 if high <= 255 else 65535
        return np.rint(values * (255 / top)).astype(np.uint8)
    return np.rint((values.astype(np.float64) - low) * (255 / max(high - low, 1e-300))).astype(np.uint8)


def _scale16(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # v * 255 / 65535, rounded


def _from_lab(image: Image.Image) -> Image.Image:
    """CIELAB (some TIFF files) to RGB: the one mode that Image.convert does not bring to RGB."""
    from PIL import ImageCms

    rgb = ImageCms.profileToProfile(
        image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    if rgb is None:
        raise ImageError("CIELAB could not be converted; convert it to RGB first")
    return rgb


def _from_array(values: np.ndarray) -> Image.Image:
    """Array to PIL image of mode L, RGB or RGBA, 8 bit."""
    shape = "[" + ", ".join(str(n) for n in values.shape) + "]"
    if values.size == 0:
        raise ImageError(f"the array has shape {shape}: nothing to see; give at least one pixel")
    if values.ndim == 3 and values.shape[2] > 4 and values.shape[0] in (1, 3, 4):
        raise ImageError(f"the array has shape {shape}, channels first; pass array.transpose(1, 2, 0)")
    if values.ndim == 4:
        raise ImageError(f"the array has shape {shape}: several pictures; give list(array), or reshape it to [H, W, 3]")
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        raise ImageError(f"the array has shape {shape}; expected [H, W], [H, W, 3] RGB or [H, W, 4] RGBA, reshape it")
    _check_size(values.shape[1], values.shape[0])
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(_to_u8(values)))


def _to_u8(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # of either byte order
        return _scale16(values)
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ImageError("a float array must lie in 0..1, this one holds NaN or infinity; replace them first")
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # resampling overshoots a little
            raise ImageError(f"a float array must lie in 0..1, this one in {low:.4g}..{high:.4g}; scale it first")
        return np.rint(np.clip(values.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    raise ImageError(f"the array holds {values.dtype}; convert it to uint8, uint16 or float in 0..1")


def patchify(rgb: np.ndarray, pre: Preprocessor) -> np.ndarray:
    """Cuts a resized picture into the vision encoder's input rows: what the C core does, in numpy.

    rgb: u8[H, W, 3].   Returns f32[P, 3 * temporal_patch_size * patch_size ** 2], each row channel-major.
    Order: cell by cell, row-major, the merge_size x merge_size patches of a cell next to each other, so that four
    rows in a row become one token. Both temporal slots hold the same picture.
    Raises ImageError for a size that is not a multiple of `pre.factor`.
    Source: transformers `Qwen2VLImageProcessorPil.patchify`; values equal to its `pixel_values`.
    """
    height, width = rgb.shape[:2]
    if height % pre.factor or width % pre.factor:
        raise ImageError(f"{width}x{height} is not a multiple of {pre.factor} pixels per side; resize it first")
    mean, std = np.array(pre.mean, np.float32), np.array(pre.std, np.float32)
    scaled = (rgb.astype(np.float64) * (1 / 255)).astype(np.float32)  # the reference's roundings, in its order
    values = ((scaled - mean) / std).transpose(2, 0, 1)
    rows, columns = pre.grid(height, width)
    cells = values.reshape(3, rows, pre.merge_size, pre.patch_size, columns, pre.merge_size, pre.patch_size)
    patches = cells.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    patches = np.broadcast_to(patches, (*patches.shape[:5], pre.temporal_patch_size, *patches.shape[6:]))
    return patches.reshape(rows * columns * pre.merge_size**2, -1)
