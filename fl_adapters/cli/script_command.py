"""Telling our options from the script's: `simulate train.py --lr 0.1 --sites 3`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand


@dataclass(frozen=True)
class Split:
    """A command line taken apart. script: None if there is none. rest: what goes to the script."""

    ours: list[str]
    script: str | None
    rest: list[str]
    doubtful: list[tuple[str, str]]  # (given, ours that it resembles)


def split(args: Sequence[str], takes_value: Mapping[str, bool]) -> Split:
    """Our options wherever they stand before "--"; the first word is the script, all else after it is the script's.

    takes_value: our options, and whether the next word is their value. An unknown option before the script stays
    with ours, where it is an error.
    """
    head, _, after = _partition(list(args))
    ours: list[str] = []
    words: list[str] = []  # the script and what goes to it
    doubtful: list[tuple[str, str]] = []
    queue = iter(head)
    for word in queue:
        name = word.partition("=")[0]
        if name in takes_value:
            ours.append(word)
            if takes_value[name] and "=" not in word:
                value = next(queue, None)
                if value is None:
                    return Split([word], None, [], [])  # an error, which the parser words
                ours.append(value)
        elif word.startswith("-") and not words:
            ours.append(word)
        else:
            similar = difflib.get_close_matches(name, takes_value, n=1, cutoff=0.85) if word.startswith("--") else []
            doubtful.extend((name, other) for other in similar)
            words.append(word)
    return Split(ours, words[0] if words else None, [*words[1:], *after], doubtful)


def _partition(args: list[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in args:
        return args, False, []
    at = args.index("--")
    return args[:at], True, args[at + 1 :]


class ScriptCommand(TyperCommand):
    """A command whose first argument is a script and that leaves unknown options to it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and self.no_args_is_help:
            return super().parse_args(ctx, args)
        takes_value = {
            name: not getattr(param, "is_flag", False)
            for param in self.get_params(ctx)
            for name in (*param.opts, *param.secondary_opts)
            if name.startswith("-")
        }
        found = split(args, takes_value)
        for given, other in found.doubtful:
            typer.echo(f"note: {given} goes to the script; did you mean {other}?", err=True)
        positional = ["--", found.script or "", *found.rest] if found.script or found.rest else []
        return super().parse_args(ctx, [*found.ours, *positional])
