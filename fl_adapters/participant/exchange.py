"""Selection of the tensors that travel, by name patterns with the wildcards of the shell (`*`, `?`, `[abc]`)."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from fl_adapters.participant.options import Exchange
from fl_runtime.errors import ConfigError


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
