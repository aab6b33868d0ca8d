"""Separates our options from the script's in a line such as `simulate train.py --lr 0.1 --sites 3`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand

from fl_runtime.errors import did_you_mean


@dataclass(frozen=True)
class Split:
    """A command line, split into our options and the script's.

    Attributes:
        ours: Our options, with their values.
        script: Name of the script, or None.
        rest: Arguments of the script.
        options: Options behind the script's name, before "--", that go to the script.
    """

    ours: list[str]
    script: str | None
    rest: list[str]
    options: list[str]


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
    options: list[str] = []
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
            if word.startswith("-") and not word[1:2].isdigit() and len(word) > 1:
                options.append(name)
            words.append(word)
    return Split(ours, words[0] if words else None, [*words[1:], *after], options)


def _partition(args: list[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in args:
        return args, False, []
    at = args.index("--")
    return args[:at], True, args[at + 1 :]


def _note(line: Split, ours: Iterable[str]) -> str:
    """Return a note on the options that the script gets, since a mistyped one of ours is not reported as unknown."""
    long = [name for name in ours if name.startswith("--")]
    marked = []
    for option in dict.fromkeys(line.options):
        question = did_you_mean(option, long).strip() if option.startswith("--") else ""
        marked.append(f"{option} ({question})" if question else option)
    return f"note: passed to {line.script}: {', '.join(marked)}"


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
        if line.options and not ctx.resilient_parsing:  # else the shell completes the line
            typer.echo(_note(line, takes_value), err=True)
        positional = ["--", line.script or "", *line.rest] if line.script or line.rest else []
        return super().parse_args(ctx, [*line.ours, *positional])
