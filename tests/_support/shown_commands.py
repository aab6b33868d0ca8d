"""Checks that a command which a page or a help text shows is one that the command line takes. It runs nothing."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Collection
from importlib import import_module
from itertools import takewhile
from typing import Any

import typer
from page_blocks import ROOT

from fl_adapters.cli.app import app

OTHERS = {"cat", "helm", "journalctl", "kubectl", "openssl", "podman", "printf", "sbatch", "scp", "step", "torchrun"}
"""Programs that are not ours: a page shows how to call them, and this test does not know their options."""

ROOT_COMMAND: Any = typer.main.get_command(app)


def parse(words: list[str], passed_on: Collection[str] = ()) -> None:
    """Parse the words after `fl-adapters` down to the last command, and run nothing.

    Args:
        words: The words.
        passed_on: Options that `simulate` is meant to pass on to the script.
    """
    command, name, above = ROOT_COMMAND, "fl-adapters", None
    if words and words[0].startswith("--"):
        assert words[0] in {option for item in command.get_params(typer.Context(command)) for option in item.opts}
        return
    while True:
        if name == "stats":  # it hands all its words to the command of its module
            import_module("fl_adapters.statistics.__main__").command_parser().parse_args(words)
            return
        if name == "simulate" and "-m" not in words:
            known = {option for item in command.params for option in item.opts}
            given = {word.partition("=")[0] for word in takewhile("--".__ne__, words) if word.startswith("--")}
            assert given <= known.union(passed_on), "simulate would hand options to the script that it does not have"
        context = command.make_context(name, list(words), parent=above)
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if not hasattr(command, "resolve_command") or not rest:
            return
        name, command, words = command.resolve_command(context, rest)
        above = context


def check(line: str, passed_on: Collection[str] = ()) -> None:
    """Check one command of a page; `passed_on` as for `parse`."""
    for part in re.split(r"\s(?:&&|\|)\s", line):
        words = shlex.split(part)
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        program, rest = words[0], words[1:]
        if program == "fl-adapters":
            parse(rest, passed_on)
        elif program == "pip":
            known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
            named = [extra for word in rest for group in re.findall(r"\[(.*)\]", word) for extra in group.split(",")]
            assert set(named) <= set(known)
        elif program == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
            assert {word for word in rest if "=" not in word} <= set(targets)
        elif program == "python" and rest[0].startswith("benchmarks/"):
            assert (ROOT / rest[0]).is_file()
        elif program.startswith("benchmarks/"):
            assert os.access(ROOT / program, os.X_OK)
        else:
            assert program in OTHERS | {"python"}, f"add {program} to those that this test knows"
