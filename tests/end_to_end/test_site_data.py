"""A script reads its own site's file: simulated, resumed, as virtual sites, and by the policy as in production."""

from __future__ import annotations

import html
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fl_adapters
from fl_adapters import Job, ProofOfConcept
from fl_runtime.store.tensorfile import read_tensors

# Every site sends the numbers of its own file, with as many examples.
READING = """
import numpy as np
import fl_adapters as fl

def initial():
    return {"mean": np.zeros(2)}

def train(task, site):
    rows = np.loadtxt(site.data or "all.csv", delimiter=",", ndmin=2)
    task.submit({"mean": rows.mean(axis=0)}, num_examples=len(rows))

if __name__ == "__main__":
    with fl.connect() as site:
        assert site.data == fl.site().data
        print("reads", site.data, flush=True)
        for task in site.tasks(initial=initial(), rounds=1):
            train(task, site)
    print("mean", site.arrays["mean"].tolist())
"""


@pytest.fixture
def reading(bench: Any) -> np.ndarray[Any, Any]:
    """The script and a file for each of two sites. Returns the mean of all rows."""
    bench.script("reading.py", READING)
    rows = np.arange(10.0).reshape(5, 2) ** 2
    (bench.folder / "parts").mkdir()
    for name, part in (("north", rows[:1]), ("south", rows[1:])):
        np.savetxt(bench.folder / "parts" / f"{name}.csv", part, delimiter=",")
    np.savetxt(bench.folder / "all.csv", rows, delimiter=",")
    return rows.mean(axis=0)  # type: ignore[no-any-return]


def model_of(folder: str | Path) -> np.ndarray[Any, Any]:
    return read_tensors(Path(folder) / "model.safetensors")["mean"]


def test_each_site_of_a_simulation_reads_its_own_file(bench: Any, reading: np.ndarray[Any, Any]) -> None:
    found = bench.json("simulate", "reading.py", "--data", "parts/{site}.csv", "--rounds", "1", "--name", "pattern")
    assert found["sites"] == 2
    np.testing.assert_allclose(model_of(found["model"]), reading)
    log = (bench.folder / "runs/pattern/sites/south/log.txt").read_text()
    assert f"reads {bench.folder}/parts/south.csv" in log
    again = repeated(bench.folder / "runs/pattern")
    np.testing.assert_allclose(model_of(bench.json(*again)["model"]), reading)


def repeated(folder: Path) -> list[str]:
    """The words of the command in a run's report that runs it again."""
    report = (folder / "report.html").read_text()
    return shlex.split(html.unescape(re.findall("<pre>(fl-adapters simulate .*?)</pre>", report)[0]))[1:]


def test_virtual_sites_have_a_file_each(bench: Any, reading: np.ndarray[Any, Any]) -> None:
    data = ("--data", "north=parts/north.csv,south=parts/south.csv")
    engine = ("--engine", "processes", "--workers", "1")
    found = bench.json("simulate", "reading.py:train", *data, "--rounds", "1", *engine)
    np.testing.assert_allclose(model_of(found["model"]), reading)


def test_alone_there_are_none(bench: Any, reading: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench.folder)
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    assert fl_adapters.site().data is None
    found = runpy.run_path("reading.py", run_name="__main__")["site"].arrays["mean"]  # of all.csv
    np.testing.assert_allclose(found, reading)


def test_in_a_proof_of_concept_the_policies_say_where_the_data_are(
    bench: Any, reading: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench.folder)
    result = Job(app="reading.py", rounds=1).run(ProofOfConcept(data="parts/{site}.csv", quiet=True))
    assert result.sites == ("north", "south")
    assert result.model is not None
    np.testing.assert_allclose(model_of(result.model), reading)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ("parts/north.csv", "does not say whose data they are"),
        ("north=parts/north.csv,south=parts/suoth.csv", "there are no data at"),
        ("prats/{site}.csv", "no file matches prats/{site}.csv"),
    ],
)
def test_a_mistyped_path_is_refused_with_what_to_do(
    bench: Any, reading: np.ndarray[Any, Any], data: str, fault: str
) -> None:
    done = bench.run("simulate", "reading.py", "--data", data)
    assert done.returncode == 1
    assert fault in done.stderr
    assert "Traceback" not in done.stderr
    assert bench.runs == []
