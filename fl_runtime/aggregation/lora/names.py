"""The two factors of a LoRA module, found by the names that PEFT gives them.

LoRA (Hu et al. 2021) adds s B A to a frozen weight: B is [out, r], A is [r, in]. PEFT names them ".lora_A.weight" and
".lora_B.weight"; those of an embedding ".lora_embedding_A" and ".lora_embedding_B". Adapters that transformers has
injected itself have the adapter's name in between: ".lora_A.default.weight".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Factor = Literal["A", "B"]

FROZEN = "lora_frozen"
"""Setting of a task: the factor that is not trained in its round."""

_FACTOR = re.compile(
    r"(?:^|\.)lora_(?:(?P<linear>[AB])(?:\.[^.]+)?\.weight|embedding_(?P<embedding>[AB])(?:\.[^.]+)?)$"
)
_PATTERNS = {"A": ("*lora_A.*weight", "*lora_embedding_A*"), "B": ("*lora_B.*weight", "*lora_embedding_B*")}


@dataclass(frozen=True)
class Pair:
    """The names of one module's factors."""

    a: str
    b: str


def factor_of(name: str) -> Factor | None:
    """Which factor a tensor is; None for any other tensor, DoRA's magnitudes and biases among them."""
    found = _FACTOR.search(name)
    if found is None:
        return None
    return "A" if "A" in (found["linear"], found["embedding"]) else "B"


def pairs_of(names: Iterable[str]) -> list[Pair]:
    """The modules of which both factors are there, in the order of `names`."""
    known = list(names)
    there, found = set(known), []
    for name in known:
        if factor_of(name) == "A":
            match = _FACTOR.search(name)
            assert match is not None
            at = match.end("linear") if match["linear"] else match.end("embedding")
            partner = f"{name[: at - 1]}B{name[at:]}"
            if partner in there:
                found.append(Pair(name, partner))
    return found


def patterns_of(factor: Factor) -> tuple[str, ...]:
    """Shell patterns that match the names of this factor and no other tensor of a PEFT adapter."""
    return _PATTERNS[factor]
