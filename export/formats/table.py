"""What a model can be exported as: one row for each format, which the command and the exporter go by.

To add one, write a module of this package with two functions,

    check(config, policy, where)      raises UnsupportedError for a model that has no such form, before any work
    write(source, target, options)    writes it, whole or not at all (runtime/files/write.py, hf_folder.py)

and add its row. `source` is an opened checkpoint: quantized as `policy` says where the mode is int4 or int8, plain
where it is bf16 (policy None). Two exports of the same source give the same bytes. A module is imported only when it is
used; a package that it needs beyond those of the extra "export" is named by the row's extra.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.errors import ModelFileError, UnsupportedError
from ...runtime.files.write import check_new_folder

if TYPE_CHECKING:
    from ...runtime.files.checkpoint import Checkpoint
    from ...runtime.files.config import ModelConfig
    from ...runtime.files.quantization import Quantization

__all__ = ["DEFAULT", "FORMATS", "MODES", "SHARD_BYTES", "Format", "WriteOptions", "choose"]

MODES = ("int4", "int8", "bf16")
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class WriteOptions:
    """How to write.

    shard_bytes: the most one of a folder's files of weights holds, a larger tensor excepted.
    finished: the .mig file that the source was opened from, if nobody needs it any more: it may be moved to the target.
    """

    shard_bytes: int = SHARD_BYTES
    finished: Path | None = None


@dataclass(frozen=True)
class Format:
    """A row.

    modes: of MODES, those that it can hold.   folder: whether it is a folder, else a file.
    suffix: what its name ends in instead of .mig where several formats are written; "" keeps the name as given.
    extra: of this package, that installs what writing needs; "" where nothing more is needed.
    """

    name: str
    modes: tuple[str, ...]
    folder: bool
    suffix: str
    extra: str = ""

    def target(self, out: Path, *, several: bool) -> Path:
        """Where it goes: `out`, or beside it where several formats are written."""
        return out.with_name(out.name.removesuffix(".mig") + self.suffix) if several and self.suffix else out

    def check_target(self, target: Path) -> None:
        """Raises ModelFileError where a target is taken by what would not be replaced."""
        if self.folder:
            check_new_folder(target)
        elif target.is_dir():
            raise ModelFileError(f"{target}: a folder, {self.name} is a file; name one, such as {target / 'm.mig'}")

    def check(self, config: "ModelConfig", policy: "Quantization | None", where: str) -> None:
        """Raises UnsupportedError for a model that has no such form.   policy: None for bf16.   where: for messages."""
        self._module().check(config, policy, where)

    def write(self, source: "Checkpoint", target: Path, options: WriteOptions) -> None:
        """Writes an opened checkpoint. Raises MigicianError; then nothing is left at the target."""
        self._module().write(source, target, options)

    def _module(self) -> Any:
        try:
            return import_module(f".{self.name.replace('-', '_')}", __package__)
        except ImportError as error:
            if not self.extra:
                raise
            raise UnsupportedError(
                f"format {self.name} cannot be written ({error}); install it: pip install 'migician[{self.extra}]'"
            ) from None


# In the order in which what was written is told; the first is what is made where none is asked for
FORMATS: tuple[Format, ...] = (
    Format("mig", MODES, folder=False, suffix=""),
    Format("gptq", ("int4", "int8"), folder=True, suffix="-gptq"),
)
DEFAULT = FORMATS[0].name


def choose(names: Sequence[str], mode: str) -> list[Format]:
    """Returns the rows of these names, in the table's order.

    Raises UnsupportedError for a name that is none, or a format that cannot hold the mode.
    """
    known = {row.name: row for row in FORMATS}
    for name in names:
        if name not in known:
            raise UnsupportedError(f"format {name} is not part of this version; choose {' or '.join(known)}")
        if mode not in known[name].modes:
            others = " or ".join(f"--{mode}" for mode in known[name].modes)
            raise UnsupportedError(f"format {name} does not hold {mode}; give {others} for it")
    return [row for row in FORMATS if row.name in names]
