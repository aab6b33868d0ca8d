"""Runs side by side on a terminal: a row for each, at any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fl_adapters.cli.pages.comparison_table import comparison_tables

RUNS = [f"tumour-1202-10{number}512" for number in range(8)]
COLUMNS = {
    "strategy": [f"fedprox:mu=0.{number}" for number in range(8)],
    "rounds": ["5", "10"] * 4,
    "--learning-rate": ["0.001", "0.0003"] * 4,
    "accuracy": [f"0.91{number}6" for number in range(8)],
    "loss": [f"0.2{number}61" for number in range(8)],
    "train_loss": [f"0.3{number}61" for number in range(8)],
}


@pytest.mark.parametrize("width", [60, 80, 140])
def test_eight_runs_are_readable_at_any_width(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for table in comparison_tables(RUNS, COLUMNS, width):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    rows = [words for line in lines if (words := line.split())[:1] and words[0] in RUNS]
    for at, run in enumerate(RUNS):
        cells = [cell for row in rows if row[0] == run for cell in row[1:]]
        assert cells == [values[at] for values in COLUMNS.values()]
    assert len(rows) == len(RUNS) * {60: 3, 80: 2, 140: 1}[width]


def test_names_that_simulations_give_their_runs_are_not_broken_at_80_columns() -> None:
    names = ["train_federated-1203-120517", "train_federated-1203-120525"]
    console = Console(file=io.StringIO(), width=80, color_system=None)
    for table in comparison_tables(names, {"app": ["a" * 40, "b" * 40], "loss": ["0.5", "0.6"]}, 80):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    assert set(names) <= set(console.file.getvalue().split())
