"""The templates of `fl-adapters new` as their users run them: by their own test, which trains alone and federated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fl_adapters
from fl_adapters import Job, ProofOfConcept
from fl_adapters.cli.scripts.new import FRAMEWORKS, write
from fl_adapters.partition import by_label

pytestmark = pytest.mark.slow

HEAVY = {"hf": "transformers", "lightning": "lightning", "keras": "keras", "monai": "monai"}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_test_of_a_template_passes(name: str, tmp_path: Path) -> None:
    """Of frameworks that take seconds to import, the half that trains in a federation."""
    pytest.importorskip(HEAVY.get(name, name))
    write(name, tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "FL_ADAPTERS_KIT"}
    packages = str(Path(fl_adapters.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [packages, environment.get("PYTHONPATH")]))
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "temp")]
    command += ["-k", "federation"] if name in HEAVY else []
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert f"{1 if name in HEAVY else 2} passed" in done.stdout


def test_a_template_reads_the_files_that_a_partition_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a proof of concept, where policies say where each site's file lies."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    write("torch", tmp_path)
    random = np.random.default_rng(4)
    x = random.normal(size=(300, 3))
    table = np.column_stack([x, x[:, 0] > 0])
    by_label(table, -1, sites=["north", "south"], alpha=2.0, seed=0).write("parts/{site}.csv")
    result = Job.from_file("job.yml", rounds=2).run(ProofOfConcept(data="parts/{site}.csv", quiet=True))
    assert result.sites == ("north", "south")
    assert len(result.rounds) == 2
    assert result.rounds[-1].metrics["accuracy"] > 0.5
