"""Coverage-guided fuzzing of decoders and of readers of files with Atheris: `make fuzz` (FUZZ_S=60 by default).

Inputs that reach new code go to .fuzz/. One that ends in any error but ours is kept as .fuzz/crash-*: put it into
tests/fuzz/corpus and correct what it shows; every later test run replays it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fl_runtime", "fl_adapters"]):
    sys.path.insert(0, str(Path(__file__).parents[1] / "_support"))
    from fuzzed_decoders import one

if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
