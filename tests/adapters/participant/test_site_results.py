"""What a site of a federation has when the job ends, without being told where to put it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from study import Study

import fl_adapters as fl
from fl_adapters.participant.kit import Kit
from fl_runtime.store.tensorfile import read_tensors

SITES = ("north", "south")


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path, SITES) as running:
        running.job(trainings=1)
        yield running


def trained(study: Study, site: str) -> None:
    """Add 1 to the model in each of two rounds; the first model scores best."""
    kit = Kit("job", site, SITES.index(site), 2, study.address, "", credentials=str(study.kits / site))
    with fl.connect(kit=str(kit.save(study.folder / "command" / site))) as run:
        for task in run.tasks(initial={"w": np.zeros(3, np.float32)}):
            task.report({"loss": float(task.round)}, num_examples=1)
            task.submit({"w": task.arrays["w"] + np.float32(1)}, num_examples=1)


def everywhere(study: Study) -> None:
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(trained, study, site) for site in SITES]:
            done.result(60)


def test_every_site_has_the_final_model(study: Study, capfd: pytest.CaptureFixture[str]) -> None:
    everywhere(study)
    told = capfd.readouterr().err
    for site in SITES:
        folder = study.kits / site / "jobs" / "job"
        assert read_tensors(folder / "model" / "model.safetensors")["w"].tolist() == [2, 2, 2]
        assert f"the final model is in {folder / 'model'}" in told


def test_a_site_whose_folder_cannot_be_written_to_ends_well_all_the_same(
    study: Study, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = study.kits / "south" / "jobs" / "job"
    folder.mkdir(parents=True)
    (folder / "model").write_text("a file where the folder should be")
    everywhere(study)
    assert study.server.wait_for_job("job", 30)
    assert study.server.queue.outcome("job")["error"] is None
    assert "the final model was not written" in capfd.readouterr().err
