"""Separates our options from the script's in a line such as `simulate train.py --lr 0.1 --sites 3`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand


@dataclass(frozen=True)
class Split:
    """A command line, split into our options and the script's.

    Attributes:
        ours: Our options, with their values.
        script: Name of the script, or None.
        rest: Arguments of the script.
        doubtful: Options that go to the script but resemble ours, as pairs (given, ours).
    """

    ours: list[str]
    script: str | None
    rest: list[str]
    doubtful: list[tuple[str, str]]


def split(args: Sequence[str], takes_value: Mapping[str, bool]) -> Split:
    """Split a command line. Our options may stand anywhere before "--"; the first other word is the script.

    An unknown option before the script counts as ours, and the parser reports it. After the script it is the script's.

    Args:
        args: Words of the command line.
        takes_value: Our options, and whether each takes the next word as its value.

    Returns:
        The parts.
    """
    head, _, after = _partition(list(args))
    ours: list[str] = []
    words: list[str] = []  # the script and its arguments
    doubtful: list[tuple[str, str]] = []
    queue = iter(head)
    for word in queue:
        name = word.partition("=")[0]
        if name in takes_value:
            ours.append(word)
            if takes_value[name] and "=" not in word:
                value = next(queue, None)
                if value is None:
                    return Split([word], None, [], [])  # the parser reports the missing value
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
    """A command whose first argument is a script, which gets all unknown options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and self.no_args_is_help:
            return super().parse_args(ctx, args)
        takes_value = {
            name: not getattr(param, "is_flag", False)
            for param in self.get_params(ctx)
            for name in (*param.opts, *param.secondary_opts)
            if name.startswith("-")
        }
        line = split(args, takes_value)
        for given, other in line.doubtful:
            typer.echo(f"note: {given} goes to the script; did you mean {other}?", err=True)
        positional = ["--", line.script or "", *line.rest] if line.script or line.rest else []
        return super().parse_args(ctx, [*line.ours, *positional])
