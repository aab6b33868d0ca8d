"""Commands and settings that the pages show are ones that the command line and the readers of files take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from page_blocks import Block, blocks, command_lines
from shown_commands import check

from fl_adapters.job import Job
from fl_runtime.filters import place_filter
from fl_runtime.trust.policy import read_policy
from fl_runtime.trust.project import Project

COMMANDS = [(block, line) for block in blocks("console") for line in command_lines(block)]


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
