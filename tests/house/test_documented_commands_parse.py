"""Commands and settings that the pages show are ones that the command line and the readers of files take."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from page_blocks import ROOT, Block, blocks, command_lines

from fl_adapters.cli.app import app
from fl_adapters.job import Job
from fl_runtime.filters import place_filter
from fl_runtime.trust.policy import read_policy
from fl_runtime.trust.project import Project

OTHERS = {"cat", "helm", "journalctl", "kubectl", "openssl", "podman", "printf", "sbatch", "scp", "step", "torchrun"}
"""Programs that are not ours: a page shows how to call them, and this test does not know their options."""

COMMANDS = [(block, line) for block in blocks("console") for line in command_lines(block)]
ROOT_COMMAND: Any = typer.main.get_command(app)


def parse(words: list[str]) -> None:
    """Parse the words after `fl-adapters` down to the last command, and run nothing."""
    command, name, above = ROOT_COMMAND, "fl-adapters", None
    if words and words[0].startswith("--"):
        assert words[0] in {option for item in command.get_params(typer.Context(command)) for option in item.opts}
        return
    while True:
        if name == "stats":  # it hands all its words to the command of its module
            import_module("fl_adapters.statistics.__main__")._parser().parse_args(words)
            return
        if name == "simulate" and "-m" not in words:
            known = {option for item in command.params for option in item.opts}
            given = {word.partition("=")[0] for word in takewhile("--".__ne__, words) if word.startswith("--")}
            assert given <= known, "simulate would hand options to the script that it does not have"
        context = command.make_context(name, list(words), parent=above)
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if not hasattr(command, "resolve_command") or not rest:
            return
        name, command, words = command.resolve_command(context, rest)
        above = context


def check(line: str) -> None:
    """Check one command of a page."""
    for part in re.split(r"\s(?:&&|\|)\s", line):
        words = shlex.split(part)
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        program, rest = words[0], words[1:]
        if program == "fl-adapters":
            parse(rest)
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


@pytest.mark.parametrize(("block", "line"), COMMANDS, ids=[f"{block.page}-{line[:60]}" for block, line in COMMANDS])
def test_a_command_of_a_page_is_one_that_is_there(block: Block, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    try:
        check(line)
    except SystemExit as end:
        raise AssertionError(f"{block.place}: {line}: exit status {end.code}") from end
    except Exception as error:
        raise AssertionError(f"{block.place}: {line}: {getattr(error, 'message', error)}") from error


def test_a_wrong_option_is_noticed() -> None:
    for line in (
        "fl-adapters compare a --outt b",
        "fl-adapters simulate a.py --round 3",
        "fl-adapters jobs",
        "make no",
    ):
        with pytest.raises(Exception):  # noqa: B017 - of click, or of this file
            check(line)


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.place)
def test_settings_of_a_page_are_read(block: Block, tmp_path: Path) -> None:
    fields = yaml.safe_load(block.text)
    if block.first.endswith("project.yml"):
        north, ada = ({"name": name, "organisation": "north-hospital"} for name in ("north", "ada"))
        others = {"server": {"address": "fl.example.org:8443"}, "sites": [north], "admins": [{**ada, "role": "lead"}]}
        Project.model_validate({"federation": "study", **others, **fields})
    elif block.first.endswith("policy.yml") or not set(fields) <= set(Job.model_fields) or is_policy(fields):
        (tmp_path / "policy.yml").write_text(block.text)
        read_policy(tmp_path / "policy.yml")
    else:
        (tmp_path / "job.yml").write_text(block.text if "app" in fields else f"app: train.py\n{block.text}")
        for item in Job.from_file(tmp_path / "job.yml").filters:
            place_filter(item)


def is_policy(fields: dict[str, Any]) -> bool:
    """Whether settings whose names a job has too are those of a site."""
    return "processes" in fields.get("resources", {})
