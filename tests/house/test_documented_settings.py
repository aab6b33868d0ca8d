"""Tables of the docs list what there is: fields of a job, arguments of adapters, extras. The README is short."""

from __future__ import annotations

import ast
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import typer

from fl_adapters.cli.app import app
from fl_adapters.job import Job
from fl_adapters.participant.options import Options
from fl_runtime.server.records.history import COLUMNS
from fl_runtime.types import Event

ROOT = Path(__file__).resolve().parents[2]


def rows(page: str, heading: str = "") -> list[list[str]]:
    """Cells of the rows of a page's tables, below a heading or on the whole page."""
    text = (ROOT / page).read_text("utf-8")
    section = text.partition(heading)[2].partition("\n## ")[0] if heading else text
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_the_page_of_the_job_has_every_field_its_option_and_its_default() -> None:
    found = {row[0].strip("`"): row for row in rows("docs/job.md", "## All fields") if row[0].startswith("`")}
    assert set(found) == set(Job.model_fields)
    simulate = typer.main.get_command(app).commands["simulate"]  # type: ignore[attr-defined]
    options = {name for item in simulate.params for name in item.opts if name.startswith("--")}
    for name, (_, option, _, default) in found.items():
        own = f"--{name.replace('_', '-')}"
        expected = f"`{own}`" if own in options else "`SCRIPT`" if name == "app" else ""
        assert option == expected, f"docs/job.md: the option of {name} is {expected or 'none'}"
        value = Job.model_fields[name].default
        if isinstance(value, str | float) and value and not isinstance(value, bool):
            shown = f"{value:g}" if isinstance(value, float) and value > 1 else str(value)
            assert shown in default, f"docs/job.md: the default of {name} is {value}"


def test_the_page_of_arguments_has_every_shared_argument() -> None:
    named = {row[0].strip("`") for row in rows("docs/arguments.md") if row[0].startswith("`")}
    assert named | {"dp_sgd"} == {field.name for field in fields(Options)}
    assert "`FederatedCallback(dp_sgd=" in (ROOT / "docs/arguments.md").read_text("utf-8")


def test_the_page_of_the_installation_has_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    text = (ROOT / "docs/install.md").read_text("utf-8")
    assert set(re.findall(r"`\[([\w-]+)\]`", text)) == set(extras)


def test_the_page_of_results_has_every_column_of_the_history() -> None:
    named = [name for row in rows("docs/results.md", "## history.csv") for name in re.findall(r"`(\w+)`", row[0])]
    assert named == [*COLUMNS, "filters"]


def emitted() -> dict[str, set[str]]:
    """Kinds of the events that the server emits with a name in the code -> the fields that are named there."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "fl_runtime").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            emits = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "emit" and bool(node.args)
            if isinstance(node, ast.Call) and emits and isinstance(node.args[0], ast.Constant):
                names = {keyword.arg for keyword in node.keywords if keyword.arg}
                found.setdefault(str(node.args[0].value), set()).update(names - {"round", "site"})
    return found


def test_the_page_of_results_has_every_kind_of_event_and_its_fields() -> None:
    told = {
        kind: set(re.findall(r"`(\w+)`", row[2]))
        for row in rows("docs/results.md", "## events.jsonl")
        for kind in re.findall(r"`(\w+)`", row[0])
    }
    passing = {"steps", "starting", "restarted", "exited"}  # for the screen; never in the file
    known = set(re.findall(r'"(\w+)"', (Event.__doc__ or "").replace('"kept", "same"', "").replace('"different"', "")))
    assert set(told) == known - passing
    for kind, names in emitted().items():
        assert kind in passing or names <= told[kind], f"docs/results.md: {kind} has {names - told[kind]} too"
