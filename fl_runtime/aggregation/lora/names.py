"""Names of the two factors of LoRA modules in PEFT models.

LoRA (Hu et al. 2021) adds s B A to a frozen weight: B is [out, r], A is [r, in]. PEFT names them ".lora_A.weight" and
".lora_B.weight", and those of an embedding ".lora_embedding_A" and ".lora_embedding_B". Adapters that transformers
injects itself have the adapter's name in between: ".lora_A.default.weight".

PEFT begins with a random A and B = 0, but for an embedding with A = 0 and a random B. A factor has no gradient while
the other one is zero. So where a strategy fixes one factor, an embedding's A and B change places: see `frozen_as`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Factor = Literal["A", "B"]

FROZEN = "lora_frozen"
"""Setting of a task: the factor ("A" or "B") that stays fixed in its round; for an embedding the other one."""

_FACTOR = re.compile(
    r"(?:^|\.)lora_(?:(?P<linear>[AB])(?:\.[^.]+)?\.weight|embedding_(?P<embedding>[AB])(?:\.[^.]+)?)$"
)
_PATTERNS = {"A": ("*lora_A.*weight", "*lora_embedding_A*"), "B": ("*lora_B.*weight", "*lora_embedding_B*")}
_FROZEN_PATTERNS = {"A": ("*lora_A.*weight", "*lora_embedding_B*"), "B": ("*lora_B.*weight", "*lora_embedding_A*")}


@dataclass(frozen=True)
class Pair:
    """The tensor names of one module's factors.

    Attributes:
        a: Name of the factor A, [r, in].
        b: Name of the factor B, [out, r].
    """

    a: str
    b: str


def factor_of(name: str) -> Factor | None:
    """Return which factor a tensor is, judged by its name; None for other tensors, such as DoRA's magnitudes."""
    match = _FACTOR.search(name)
    if match is None:
        return None
    return "A" if "A" in (match["linear"], match["embedding"]) else "B"


def frozen_as(name: str) -> Factor | None:
    """Return with which factor a tensor is fixed: with its own, an embedding's with the other one.

    None for tensors that are no factors. What is fixed with "A" begins as random numbers in a model of PEFT.
    """
    factor, match = factor_of(name), _FACTOR.search(name)
    if factor is None or match is None or match["linear"]:
        return factor
    return "B" if factor == "A" else "A"


def frozen_patterns(factor: Factor) -> tuple[str, ...]:
    """Return name patterns (`fnmatch`) of the tensors that are fixed with this factor; see `frozen_as`."""
    return _FROZEN_PATTERNS[factor]


def pairs_of(names: Iterable[str]) -> list[Pair]:
    """Return the modules whose factors are both among the names, in their order."""
    ordered = list(names)
    present, pairs = set(ordered), []
    for name in ordered:
        if factor_of(name) == "A":
            match = _FACTOR.search(name)
            assert match is not None
            at = match.end("linear") if match["linear"] else match.end("embedding")
            partner = f"{name[: at - 1]}B{name[at:]}"
            if partner in present:
                pairs.append(Pair(name, partner))
    return pairs


def patterns_of(factor: Factor) -> tuple[str, ...]:
    """Return name patterns (`fnmatch`) that match this factor and no other tensor of a PEFT adapter."""
    return _PATTERNS[factor]
