"""Describes the C core to cffi: `setup.py` and `python runtime/build_migi.py` compile it from here."""

import os
import re
from pathlib import Path

from cffi import FFI

_CSRC = Path(__file__).resolve().parent / "csrc"


def declarations(header: str) -> str:
    """Returns migi.h without preprocessor lines, C++ guards and export marks: what cffi's parser reads."""
    header = re.sub(r"#ifdef __cplusplus.*?#endif", "", header, flags=re.S)
    header = re.sub(r"^#.*$", "", header, flags=re.M)
    return header.replace("MIGI_API ", "")


ffibuilder = FFI()
ffibuilder.cdef(declarations((_CSRC / "migi.h").read_text()) + '\nextern "Python" int migi_poll_signals(void *arg);\n')
ffibuilder.set_source(
    "migician.runtime._migi",
    '#include "migi.h"',
    sources=sorted(os.path.relpath(path) for path in _CSRC.glob("*.c")),
    include_dirs=[os.path.relpath(_CSRC)],
    depends=sorted(os.path.relpath(path) for pattern in ("*.h", "*.inc") for path in _CSRC.glob(pattern)),
    extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=off", "-g0", "-fvisibility=hidden"]
    + ["-Wall", "-Wextra", "-Wshadow"]
    + (["-Werror", "-Wno-error=cast-function-type"] if os.environ.get("MIGI_WERROR") == "1" else []),
    extra_link_args=["-pthread"],
    libraries=["m"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
