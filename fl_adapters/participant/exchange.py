"""Which tensors travel: those that patterns select, and nothing else from the handshake on.

Patterns have the wildcards of the shell (`*`, `?`, `[abc]`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from fl_adapters.participant.options import Exchange
from fl_runtime.errors import ConfigError, ProtocolError, StateMismatchError
from fl_runtime.types import Arrays, Strategy


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a tensor's name matches at least one pattern. Case matters.

    Args:
        name: Name of the tensor.
        patterns: Patterns such as "encoder.*".

    Returns:
        True for a match.
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def selected(names: Iterable[str], exchange: Exchange, keep_local: tuple[str, ...]) -> list[str]:
    """Return the names of the tensors that travel.

    Args:
        names: Names of all tensors that could travel. The adapter has already applied "auto", "trainable" or "all".
        exchange: Patterns of tensors to exchange; "auto", "trainable" and "all" select every name.
        keep_local: Patterns of tensors that never leave the site.

    Returns:
        The selected names, in the order of `names`.

    Raises:
        ConfigError: A pattern matches no name, or no tensor is selected.
    """
    all_names = list(names)
    admitted = all_names if isinstance(exchange, str) else [n for n in all_names if matches(n, exchange)]
    for argument, patterns in (("exchange", () if isinstance(exchange, str) else exchange), ("keep_local", keep_local)):
        for pattern in patterns:
            if not any(fnmatchcase(n, pattern) for n in all_names):
                raise ConfigError(
                    f"{argument}: the pattern {pattern!r} matches no tensor",
                    fix=f"give a pattern for names such as {', '.join(all_names[:4])}",
                )
    exchanged = [n for n in admitted if not matches(n, keep_local)]
    if not exchanged:
        raise ConfigError(
            "no tensor is left to exchange: keep_local matches all that exchange selects",
            where=f"exchange={exchange!r}, keep_local={list(keep_local)!r}",
            fix="let exchange= match more names, or keep_local= fewer",
        )
    return exchanged


@dataclass(frozen=True)
class RegisteredModel:
    """The tensors that a site registered at the handshake, with which it compares whatever arrives and leaves.

    Attributes:
        layout: Tensor name -> dtype, and the part of the shape that is equal at all sites (-1 where it may differ).
        strategy: The run's strategy, which says what that part is.
    """

    layout: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
    strategy: Strategy

    @classmethod
    def of(cls, state: Arrays, strategy: Strategy) -> RegisteredModel:
        """Describe the tensors of a model, which is not kept."""
        return cls({n: (a.dtype, strategy.agreed_shape(n, a.shape)) for n, a in state.items()}, strategy)

    def check_arrived(self, arrays: Arrays, where: str) -> None:
        """Check a model of the server.

        Args:
            arrays: The model's tensors, decoded.
            where: Location for the error message.

        Raises:
            ProtocolError: It has other tensors than this site registered, or they have other shapes or dtypes.
        """
        wrong = sorted(self.layout.keys() ^ arrays.keys())
        for name in () if wrong else arrays:
            dtype, shape = self.layout[name]
            if arrays[name].dtype != dtype or self.strategy.agreed_shape(name, arrays[name].shape) != shape:
                wrong.append(name)
        if wrong:
            raise ProtocolError(
                f"the server sends a model that is not the one of the handshake: {', '.join(wrong[:4])} "
                f"{'differs' if len(wrong) == 1 else 'differ'} in name, shape or dtype",
                where=where,
                fix="ask the server's operator; this site goes on with no such model",
            )

    def check_leaving(self, arrays: Arrays, where: str) -> None:
        """Check that an update has only tensors that were registered, whatever names a task carried.

        Args:
            arrays: The update's tensors.
            where: Location for the error message.

        Raises:
            StateMismatchError: There are others.
        """
        others = [name for name in arrays if name not in self.layout]
        if others:
            raise StateMismatchError(
                f"tensors that were not registered at the handshake do not leave the site: {', '.join(others[:4])}",
                where=where,
                fix="submit only the tensors of `initial`, or give them all there",
            )
