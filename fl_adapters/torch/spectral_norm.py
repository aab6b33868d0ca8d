"""Spectral normalisation of torch: its singular vectors, which follow from the weights and are no averages.

A layer divides its weight W by its largest singular value s = u^T W v. The buffers u and v estimate the singular
vectors. Their signs are arbitrary: the mean of two sites' vectors may be zero, and the weight W / s infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

ITERATIONS = 15
"""Power iterations after new weights have arrived: as many as torch makes when a layer is normalised first."""


@dataclass(frozen=True)
class SpectralLayer:
    """A weight under spectral normalisation.

    Attributes:
        weight: Returns the weight that is normalised, of any shape.
        dim: Dimension of the weight that becomes the rows of W.
        u: Live estimate of the left singular vector, of shape [rows].
        v: Live estimate of the right singular vector, of shape [columns].
        eps: Smallest norm by which a vector is divided.
    """

    weight: Callable[[], Tensor]
    dim: int
    u: Tensor
    v: Tensor
    eps: float

    @torch.no_grad()
    def estimate(self) -> None:
        """Compute u and v anew from the weight, in place, by power iterations that start from their values.

        Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", algorithm 1.
        """
        matrix = self.weight().movedim(self.dim, 0).flatten(1)
        for _ in range(ITERATIONS):
            self.u.copy_(nn.functional.normalize(matrix @ self.v, dim=0, eps=self.eps))
            self.v.copy_(nn.functional.normalize(matrix.T @ self.u, dim=0, eps=self.eps))


def spectral_layers(module: nn.Module) -> Iterator[SpectralLayer]:
    """Find the normalised weights of a module, by either of torch's two functions called `spectral_norm`.

    Args:
        module: The live module.

    Yields:
        Each normalised weight that is a matrix or more. A vector is divided by its norm, without u and v.
    """
    norm: Any
    for part in module.modules():
        for number, norm in enumerate(part if isinstance(part, ParametrizationList) else ()):
            if type(norm).__name__ == "_SpectralNorm" and hasattr(norm, "_u"):
                yield SpectralLayer(partial(_before, part, number), norm.dim, norm._u, norm._v, norm.eps)
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                weight = partial(getattr, part, f"{hook.name}_orig")
                u, v = (getattr(part, f"{hook.name}_{end}") for end in "uv")
                yield SpectralLayer(weight, hook.dim, u, v, hook.eps)


def _before(parametrizations: Any, number: int) -> Tensor:
    """Weight as one of its parametrizations gets it from those before."""
    weight: Tensor = parametrizations.original
    for earlier in islice(parametrizations, number):
        weight = earlier(weight)
    return weight
