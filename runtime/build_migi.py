"""Describes the C core to cffi: `setup.py` and `python runtime/build_migi.py` compile it from here."""

import os
import re
from pathlib import Path

from cffi import FFI

_CSRC = Path(__file__).resolve().parent / "csrc"
_HEADERS = ("migi.h", "migi_measure.h")


def declarations(header: str) -> str:
    """Returns a public header without preprocessor lines, C++ guards and export marks: what cffi's parser reads."""
    header = re.sub(r"#ifdef __cplusplus.*?#endif", "", header, flags=re.S)
    header = re.sub(r"^#.*$", "", header, flags=re.M)
    return header.replace("MIGI_API ", "")


def flags() -> list[str]:
    """Returns what every build of the core is compiled with."""
    lines = (_CSRC / "flags.txt").read_text().splitlines()
    return [flag for line in lines if line.startswith("-") for flag in line.split()]


ffibuilder = FFI()
ffibuilder.cdef("".join(declarations((_CSRC / name).read_text()) for name in _HEADERS))
ffibuilder.cdef('extern "Python" int migi_poll_signals(void *arg);')
ffibuilder.set_source(
    "migician.runtime._migi",
    "".join(f'#include "{name}"\n' for name in _HEADERS),
    sources=sorted(os.path.relpath(path) for path in _CSRC.rglob("*.c")),
    include_dirs=[os.path.relpath(_CSRC)],
    depends=sorted(os.path.relpath(path) for kind in ("*.h", "*.inc", "*.txt") for path in _CSRC.rglob(kind)),
    extra_compile_args=[*flags(), "-O3", "-g0"]
    + (["-Werror", "-Wno-error=cast-function-type"] if os.environ.get("MIGI_WERROR") == "1" else []),
    extra_link_args=["-pthread"],
    libraries=["m"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
