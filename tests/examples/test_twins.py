"""The examples: a federated script is its local twin plus a few lines, and its data is distributed fairly."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TWINS = sorted(EXAMPLES.rglob("*_federated.py"))


def test_there_are_twins() -> None:
    assert len(TWINS) >= 3


def replaced_lines(folder: Path) -> int:
    """Return how many lines a federated twin may replace.

    With a trainer none: a callback is added to what is there. A loop of one's own has no hooks, so its two `for` lines
    take their rounds and batches from elsewhere, and nothing else may change.
    """
    return 2 if folder.relative_to(EXAMPLES).parts[0] == "torch" else 0


@pytest.mark.parametrize("federated", TWINS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_federated_twin_adds_at_most_three_lines_and_changes_only_for_lines_of_loops(federated: Path) -> None:
    local = federated.with_stem(federated.stem.removesuffix("_federated"))
    lines = list(difflib.ndiff(local.read_text().splitlines(), federated.read_text().splitlines()))
    removed, added = ([line[2:] for line in lines if line.startswith(sign)] for sign in ("- ", "+ "))
    assert len(removed) <= replaced_lines(federated.parent)
    assert all(line.lstrip().startswith("for ") for line in removed)
    new_loops = [line for line in added if line.lstrip().startswith("for ")]
    assert [indentation(line) for line in new_loops] == [indentation(line) for line in removed]
    assert 1 <= len(added) - len(removed) <= 3


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


@contextmanager
def example(folder: Path) -> Iterator[ModuleType]:
    """Return an example's data module, imported from its own folder as its scripts do."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(f"data_of_{folder.parent.name}_{folder.name}", folder / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before
        del sys.modules[spec.name]


@pytest.fixture(scope="module", params=["text_classification", "causal_lm"])
def texts(request: pytest.FixtureRequest) -> Iterator[tuple[ModuleType, list[Any]]]:
    """Return an example's data module, and the parts of its three sites."""
    with example(EXAMPLES / "hf" / request.param) as module:
        yield module, [module.load(shard=f"{i}/3") for i in (1, 2, 3)]


def test_sites_share_no_row_and_none_trains_on_what_is_held_out(texts: tuple[ModuleType, list[Any]]) -> None:
    _, parts = texts
    mine = [{*part.train, *part.validation} for part in parts]
    assert all(mine)
    assert not mine[0] & mine[1] | mine[0] & mine[2] | mine[1] & mine[2]
    held_out = set(parts[0].test)
    assert all(set(part.test) == held_out for part in parts)
    assert not held_out & set.union(*mine)


def test_the_division_is_the_same_every_time(texts: tuple[ModuleType, list[Any]]) -> None:
    module, parts = texts
    first, again = parts[1], module.load(shard="2/3")
    assert (first.train, first.validation, first.test) == (again.train, again.validation, again.test)


def test_rows_of_text_are_uneven_and_a_thousand_are_held_out(texts: tuple[ModuleType, list[Any]]) -> None:
    module, parts = texts
    if not hasattr(module, "ROWS"):
        pytest.skip("the language model's text is divided by plays, not by rows")
    assert len(parts[0].test) >= 1000
    sizes = sorted(len(part.train) for part in parts)
    assert sizes[-1] > 1.2 * sizes[0]


@pytest.mark.parametrize("framework", ["keras", "lightning", "torch"])
def test_images_are_dealt_out_whole_and_unevenly(framework: str) -> None:
    with example(EXAMPLES / framework / "image_classification") as data:
        shares = [data.images.load("digits", f"{i}/4", 0) for i in (1, 2, 3, 4)]
        everything = data.images.load("digits", "1/1", 0)
    sizes = [len(share.train[0]) + len(share.validation[0]) for share in shares]
    assert sum(sizes) == len(everything.train[0]) + len(everything.validation[0])
    assert max(sizes) > 1.2 * min(sizes)
    assert all((share.test[0] == everything.test[0]).all() for share in shares)
    assert len(everything.test[0]) >= 1000
