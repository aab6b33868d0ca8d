"""Backups of a server's data folder: made under load, restored, and taken up by sites that are ahead of them."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site, at_once
from read_only import bound_by_modes, make_read_only
from study import Study, until
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_adapters.cli.federation.server import data_folder, read_job
from fl_runtime.errors import ConfigError, PermissionDeniedError, StoreError
from fl_runtime.server.federation.federation import FederationServer
from fl_runtime.store.backup import KIT_PART, back_up, read_backup, restore
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.trust import audit
from fl_runtime.trust.authority import signed_members
from fl_runtime.trust.kits import read_kit, write_kit
from fl_runtime.trust.working_kit import WORKING_KIT
from fl_runtime.types import Arrays, Task

W = {"w": np.zeros(50_000, np.float32)}
ROUNDS = 40


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path) as running:
        yield running


def change(site: Site, task: Task) -> Arrays:
    return {"w": task.arrays["w"] * np.float32(0.9) + np.float32(1 + (site.name == "south"))}


def quiet_run(rounds: int) -> np.ndarray[Any, Any]:
    """The weights after so many rounds, by a plain loop."""
    w = np.zeros(1, np.float32)
    for _ in range(rounds):
        north, south = w * np.float32(0.9) + np.float32(1), w * np.float32(0.9) + np.float32(2)
        w = ((north.astype(np.float64) + south.astype(np.float64)) / 2).astype(np.float32)
    return w


def train(site: Site, pause: threading.Event | None = None, at: int = 0) -> Arrays:
    """Take part to the end, and stop before the update of round `at` until `pause` is set."""
    site.join("job")
    site.register(W)
    task = site.start(W)
    while task.kind == "train":
        if pause is not None and task.round == at:
            pause.wait(30)
        site.submit(task, change(site, task))
        task = site.client.next_task()
    final = {"w": np.copy(task.arrays["w"])}
    site.client.leave("done", early=False)
    site.client.close()
    return final


def restored(study: Study, backup: Path, name: str) -> Path:
    restore(backup, study.folder / name, "study")
    study.runs = study.folder / name
    return study.runs


def test_backups_under_load_go_on_to_the_bits_of_a_quiet_run(study: Study, tmp_path: Path) -> None:
    study.job("job", rounds=ROUNDS)
    sites = [study.site(name) for name in study.sites]
    has_model = threading.Event()  # on a slow machine, the run would be over before the first backup
    training = threading.Thread(target=lambda: at_once(sites, lambda site: train(site, has_model, ROUNDS // 2)))
    training.start()
    backups = []
    while training.is_alive() and len(backups) < 200:
        backups.append(back_up(study.runs, tmp_path / f"backup-{len(backups)}", "study"))
        if any("/blobs/model-" in name for name in backups[-1].files):
            has_model.set()
    training.join(60)
    assert study.server.wait_for_job("job", 30)
    study.server.close()

    begun = {json.loads((item.folder / "job/job.json").read_text())["state"]: item for item in backups}
    middle = [item for item in backups if any("/blobs/model-" in name for name in item.files)]
    assert middle, f"no backup has a model, of {len(backups)}"
    chosen = {id(item): item for item in (*begun.values(), middle[0], middle[len(middle) // 2], middle[-1])}
    for number, item in enumerate(chosen.values()):
        runs = restored(study, item.folder, f"data-{number}")
        study.start()
        if study.server.queue.record("job").state != "finished":
            at_once([study.site(name) for name in study.sites], train)
            assert study.server.wait_for_job("job", 30)
        assert study.server.outcome("job")["error"] is None
        assert [each["round"] for each in study.server.outcome("job")["rounds"]] == [*range(1, ROUNDS + 1)]
        np.testing.assert_array_equal(read_tensors(runs / "job/model/model.safetensors")["w"], quiet_run(ROUNDS)[0])
        study.server.close()
    assert not (study.runs / ".backup/links").exists()


def test_sites_that_are_ahead_of_a_restored_server_go_back_to_its_round(
    study: Study, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study.job("job", rounds=6)
    early, late = threading.Event(), threading.Event()
    sites = [study.site(name) for name in study.sites]
    finals: list[Arrays] = []

    def work(site: Site) -> None:
        site.join("job")
        site.register(W)
        task = site.start(W)
        while task.kind == "train":
            if (task.round, early.is_set()) == (2, False):
                early.wait(30)
            if (task.round, late.is_set()) == (5, False):
                late.wait(30)
            site.submit(task, change(site, task))
            task = site.client.next_task()
        finals.append({"w": np.copy(task.arrays["w"])})
        site.client.leave("done", early=False)

    def in_round(number: int) -> bool:
        job = study.server.queue.job("job")
        return job is not None and job.server.state()["round"] == number

    training = threading.Thread(target=lambda: at_once(sites, work))
    training.start()
    until(lambda: in_round(2), "round 2")
    back_up(study.runs, tmp_path / "monday", "study")
    early.set()
    until(lambda: in_round(5), "round 5")
    address = study.address
    study.server.close()
    restored(study, tmp_path / "monday", "again")
    study.start(address)
    assert in_round(2)
    late.set()  # both sites answer a round that the server has lost
    training.join(60)
    assert study.server.wait_for_job("job", 30)
    assert [each["round"] for each in study.server.outcome("job")["rounds"]] == [1, 2, 3, 4, 5, 6]
    for final in finals:
        np.testing.assert_array_equal(final["w"], quiet_run(6)[0])
    assert len(finals) == 2
    assert "goes back from round 5 to round 2" in caplog.text


def test_a_process_that_joined_after_the_backup_goes_on_and_the_one_before_it_does_not(
    study: Study, tmp_path: Path
) -> None:
    study.job("job", rounds=3, min_sites=1, sites=["north"])
    first = study.site("north")
    first.join("job")
    first.register(W)
    first.start(W)
    back_up(study.runs, tmp_path / "monday", "study")
    second = study.site("north")
    second.join("job")
    second.register(W)
    task = second.client.next_task()
    address = study.address
    study.server.close()
    restored(study, tmp_path / "monday", "again")
    study.start(address)

    assert second.submit(task, change(second, task)) == "late"  # asked again, for the round as it is now
    task = second.client.next_task()
    assert (task.kind, task.round) == ("train", 1)
    assert second.submit(task, change(second, task)) == "used"
    with pytest.raises(Exception, match="attempt 2 has taken over"):
        first.client.next_task()
    third = study.site("north")
    assert third.join("job").attempt > 2


def test_a_finished_job_takes_the_disk_of_its_results(study: Study) -> None:
    study.job("job", rounds=3)
    at_once([study.site(name) for name in study.sites], train)
    assert study.server.wait_for_job("job", 30)
    folder = study.runs / "job"
    until(lambda: not list((folder / "server").rglob("*.safetensors")), "the server's tensors to be deleted")
    np.testing.assert_array_equal(read_tensors(folder / "model/model.safetensors")["w"], quiet_run(3)[0])
    left = {path.name for path in (folder / "server").rglob("*") if path.is_file()}
    assert left <= {"lock", "journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm"}
    again = study.site("north")
    again.join("job")  # its script was killed after the last round
    again.register(W)
    assert again.client.next_task().arrays["w"][0] == quiet_run(3)[0]


def test_an_aborted_job_keeps_what_a_resumption_needs_and_no_buffers(study: Study) -> None:
    study.job("job", rounds=3)
    sites = [study.site(name) for name in study.sites]
    at_once(sites, lambda site: (site.join("job"), site.register(W)))
    tasks = at_once(sites, lambda site: site.start(W))
    at_once([0, 1], lambda index: sites[index].submit(tasks[index], change(sites[index], tasks[index])))
    sites[0].client.next_task()  # round 2 is open: the files of round 1 are buffers now
    study.admin("lena").ask("AbortJob", job="job")
    assert study.server.wait_for_job("job", 30)
    names = sorted(path.name for path in (study.runs / "job/server/blobs").iterdir())
    assert names
    assert not [name for name in names if name.startswith(("free-", "upload-"))]
    study.admin("lena").ask("ResumeJob", job="job")
    finals = at_once([study.site(name) for name in study.sites], train)
    np.testing.assert_array_equal(finals[0]["w"], quiet_run(3)[0])


def test_a_data_folder_belongs_to_one_federation_and_one_server(study: Study, tmp_path: Path) -> None:
    kit = read_kit(study.kits / "server")
    with pytest.raises(StoreError, match="another server of this federation uses this folder"):
        FederationServer(kit, study.runs, read_job)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/federation.json").write_text('{"format": 1, "federation": "flu"}')
    with pytest.raises(ConfigError, match="the data folder of the federation flu, not of study"):
        FederationServer(kit, tmp_path / "other", read_job)


def test_a_backup_is_whole_or_refused(study: Study, tmp_path: Path) -> None:
    study.job("waiting", sites=["north"])
    until(lambda: (study.runs / "waiting/server/journal.sqlite").exists(), "the journal")
    made = back_up(study.runs, tmp_path / "one", "study")
    assert made.jobs == ("waiting",)
    with pytest.raises(ConfigError, match="not empty"):
        back_up(study.runs, tmp_path / "one", "study")
    with pytest.raises(ConfigError, match="not empty"):
        restore(tmp_path / "one", study.kits, "study")
    with pytest.raises(ConfigError, match="of the federation study, not of flu"):
        restore(tmp_path / "one", tmp_path / "new", "flu")
    with pytest.raises(ConfigError, match="not a backup"):
        restore(study.runs, tmp_path / "new", "study")
    (tmp_path / "one/waiting/job.json").write_bytes(b"{}")
    with pytest.raises(StoreError, match=r"waiting/job.json is not what was backed up"):
        restore(tmp_path / "one", tmp_path / "new", "study")
    (tmp_path / "one/waiting/job.json").unlink()
    with pytest.raises(StoreError, match=r"waiting/job.json is not what was backed up"):
        restore(tmp_path / "one", tmp_path / "new", "study")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_the_commands_find_the_folder_beside_the_kit(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    kit, elsewhere = study.kits / "server", tmp_path / "elsewhere"
    elsewhere.mkdir()
    study.job("waiting", sites=["north"])
    study.server.close()
    study.runs.rename(study.kits / "server-data")
    assert data_folder(kit, None) == study.kits / "server-data"
    monkeypatch.chdir(elsewhere)
    runner = CliRunner()
    made = runner.invoke(app, ["server", "backup", "monday", "--kit", str(kit), "--json"])
    assert json.loads(made.stdout.splitlines()[-1])["jobs"] == ["waiting"], made.output
    data = str(tmp_path / "again")
    back = runner.invoke(app, ["server", "restore", "monday", "--kit", str(kit), "--data", data, "--json"])
    assert json.loads(back.stdout.splitlines()[-1])["data"] == data, back.output
    assert (tmp_path / "again/waiting/job.json").exists()

    (study.kits / "server-data").rename(elsewhere / "runs")  # where versions before --data kept them
    refused = runner.invoke(app, ["server", "--kit", str(kit)])
    assert refused.exit_code == 1
    assert "an earlier version left jobs of study here: waiting" in refused.output
    assert not (study.kits / "server-data").exists()
    study.runs = elsewhere / "runs"
    study.start()


def command(*words: str | Path) -> str:
    done = CliRunner().invoke(app, ["server", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


def verified(kit: Path) -> list[dict[str, Any]]:
    """The lines of a kit's audit log, in which nothing is wrong."""
    assert audit.verify(kit, audit.Anchor(kit=kit))[1] == []
    return audit.entries(kit)


@pytest.fixture
def saved(study: Study, tmp_path: Path) -> Path:
    """A backup of a server that has revoked somebody and whose log grows while it is made; lines were added since."""
    kit, backup = study.kits / "server", tmp_path / "backup"
    shutil.copytree(kit, tmp_path / "old-kit", ignore=shutil.ignore_patterns("audit*", "log-counter*"))
    study.authority.revoke("mina")
    study.admin().ask("Revoke", crl=study.authority.crl.decode(), members=signed_members(study.authority).decode())
    done = threading.Event()

    def keep_writing() -> None:
        log = audit.AuditLog(kit, kit)
        while not done.is_set():
            log.write("called", None)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    command("backup", backup, "--kit", kit, "--data", study.runs)
    done.set()
    writer.join(30)
    study.server.close()
    return backup


@pytest.mark.parametrize("key", ["as provisioned", "another"])
def test_a_backup_has_the_audit_log_and_a_kit_without_one_goes_on_with_it(
    key: str, study: Study, saved: Path, tmp_path: Path
) -> None:
    kit, data = tmp_path / "old-kit", tmp_path / "data"
    if key == "another":
        shutil.rmtree(kit)
        write_kit(kit, study.authority, study.authority.project.participant("server"))
    whole = study.log()
    assert "that of the backup" in command("restore", saved, "--kit", kit, "--data", data)
    *before, mark = verified(kit)
    assert before == whole[: len(before)]
    assert "backup made" in {entry["action"] for entry in before}
    assert len(before) < len(whole), "lines since the backup are lost, and the log says so"
    assert (mark["action"], mark["line_then"]["number"]) == ("data restored from a backup", len(before))
    assert mark["made_at"] == datetime.fromtimestamp(read_backup(saved).made_at, UTC).isoformat(timespec="seconds")
    assert not (data / KIT_PART).exists()
    study.runs, study.kits = data, tmp_path
    (tmp_path / "old-kit").rename(tmp_path / "server")
    study.start()  # it refuses whom it had refused
    assert len(verified(tmp_path / "server")) == len(before) + 2
    study.kits = study.folder / "kits"
    with pytest.raises(PermissionDeniedError, match="revoked"):
        study.admin("mina").ask("Status")


def test_a_log_that_survived_goes_on_and_tells_of_the_restoration(study: Study, saved: Path, tmp_path: Path) -> None:
    kit, whole = study.kits / "server", study.log()
    said = command("restore", saved, "--kit", kit, "--data", tmp_path / "data")
    *before, mark = verified(kit)
    assert before == whole
    newer = len(whole) - mark["line_then"]["number"]
    assert newer > 0
    assert f"that of the kit, which has {newer} lines since the backup" in said
    study.start()


def test_a_log_that_is_not_that_of_the_backup_is_kept_and_says_so(study: Study, saved: Path, tmp_path: Path) -> None:
    kit = tmp_path / "old-kit"
    audit.AuditLog(kit, kit).write("server started")
    said = command("restore", saved, "--kit", kit, "--data", tmp_path / "data")
    assert "that of the kit; the one in the backup, which ends with line" in said
    assert [entry["action"] for entry in verified(kit)] == ["server started", "data restored from a backup"]
    study.start()


def test_a_restored_server_with_a_kit_that_cannot_be_written(study: Study, saved: Path, tmp_path: Path) -> None:
    kit, data = tmp_path / "old-kit", tmp_path / "data"
    make_read_only(kit)
    with bound_by_modes():
        command("restore", saved, "--kit", kit, "--data", data)
    working = data / WORKING_KIT
    assert verified(working)[-1]["action"] == "data restored from a backup"
    newest = (study.authority.folder / "crl.pem").read_bytes()
    assert (working / "crl.pem").read_bytes() == newest != (kit / "crl.pem").read_bytes()
    study.start()
