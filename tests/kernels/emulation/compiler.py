#!/usr/bin/env python3
"""A C++ compiler for processors with AVX2 only, whose AVX-512 and AMX are those of ``immintrin.h`` here.

``compiler.py g++ ARGS`` compiles as ``g++ ARGS`` would, without the flags that let it use those instructions
itself; what is compiled finds every feature of a processor that it asks for.
"""

import os
import sys
from pathlib import Path

_REAL = ("-mavx512", "-mamx")
# With its SLP vectorizer (-O3) GCC 12 gets one loop over emulated vectors wrong; why is not known.
_NARROW = ["-mavx2", "-mfma", "-mf16c", "-O2", "-ftree-loop-vectorize", "-fno-tree-slp-vectorize"]


def main(arguments: list[str]) -> None:
    """Becomes the real compiler."""
    kept = [argument for argument in arguments if not argument.startswith(_REAL)]
    narrow = _NARROW if len(kept) < len(arguments) else []
    emulation = [f"-I{Path(__file__).parent}", "-D__builtin_cpu_supports(feature)=1"]
    os.execvp(kept[0], [*kept, *narrow, *emulation])


if __name__ == "__main__":
    main(sys.argv[1:])
