"""Which tensors travel, by name patterns as the shell knows them (`*`, `?`, `[abc]`)."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from fl_adapters.participant.options import Exchange
from fl_runtime.errors import ConfigError


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def selected(names: Iterable[str], exchange: Exchange, keep_local: tuple[str, ...]) -> list[str]:
    """The names that travel, in order: those that `exchange` admits, less those that `keep_local` holds back.

    "auto", "trainable" and "all" admit every name given: what they mean is for the adapter to say.
    Raises ConfigError when a pattern matches nothing (a typing error, most likely) or nothing is left.
    """
    every = list(names)
    admitted = every if isinstance(exchange, str) else [n for n in every if matches(n, exchange)]
    for argument, patterns in (("exchange", () if isinstance(exchange, str) else exchange), ("keep_local", keep_local)):
        for pattern in patterns:
            if not any(fnmatchcase(n, pattern) for n in every):
                raise ConfigError(
                    f"{argument}: the pattern {pattern!r} matches no tensor",
                    fix=f"names look like {', '.join(every[:4])}",
                )
    travelling = [n for n in admitted if not matches(n, keep_local)]
    if not travelling:
        raise ConfigError("nothing is left to exchange", fix="loosen exchange= or keep_local=")
    return travelling
