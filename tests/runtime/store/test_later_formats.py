"""Data that a later version has written: each file is refused with the version to install, and is not changed."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import at_once
from study import Study

from fl_adapters.cli.site.assignment import Assignment
from fl_adapters.cli.site.records import JobFolder, check_state
from fl_adapters.participant.kit import read_kit as read_script_kit
from fl_adapters.participant.state_file import read_state, write_state
from fl_runtime.errors import NewerFormatError
from fl_runtime.filters.ledger import Ledger
from fl_runtime.server.federation.renewals import Renewals
from fl_runtime.store.backup import back_up, read_backup, restore
from fl_runtime.store.journal import Journal
from fl_runtime.store.tensorfile import read_tensors, write_tensors
from fl_runtime.trust.audit import Anchor, AuditLog, verify
from fl_runtime.trust.authority import Authority, signed_members
from fl_runtime.trust.kits import read_kit
from fl_runtime.trust.project import read_members
from fl_runtime.trust.roots.outside import read_outside, signed_outside

W = {"w": np.zeros(3, np.float32)}
LATER = {"format": 2, "version": "0.9.0"}


def rewrite(file: Path, **fields: Any) -> None:
    """Change fields of a JSON file, as a later version would write them."""
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **fields}), "utf-8")


def digest_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, without locks and what SQLite keeps beside a database."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in ("", ".server")]
    kept = [path for path in files if not path.name.endswith(("-wal", "-shm")) and path.name[0] != "."]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def test_a_server_does_not_give_up_the_jobs_of_a_later_version(study: Study) -> None:
    study.job("running")
    study.job("waiting")
    study.server.close()
    for change, words in [
        (LATER, "the job has format 2, and this version reads up to 1"),
        ({"format": 1, "settings": {**settings_of(study, "running"), "warmth": 3}}, "the job has the settings warmth"),
    ]:
        kept = (study.runs / "running" / "job.json").read_text("utf-8")
        rewrite(study.runs / "running" / "job.json", **{"version": "0.9.0", **change})
        before = digest_of(study.runs)
        with pytest.raises(NewerFormatError) as refused:
            study.start()
        assert words in refused.value.what
        assert refused.value.fix.startswith("install fl-adapters 0.9.0 or later here, or restore the backup from")
        assert digest_of(study.runs) == before
        (study.runs / "running" / "job.json").write_text(kept, "utf-8")
    study.start()  # the version that can read them is back
    states = {job["job"]: job["state"] for job in study.admin().ask("Status")["jobs"]}
    assert states == {"running": "running", "waiting": "queued"}


def settings_of(study: Study, job: str) -> dict[str, Any]:
    return dict(json.loads((study.runs / job / "job.json").read_text("utf-8"))["settings"])


def test_a_server_does_not_give_up_a_job_with_a_journal_of_a_later_version(study: Study) -> None:
    study.job()
    study.server.close()
    journal = study.runs / "job" / "server" / "journal.sqlite"
    with sqlite3.connect(journal) as db:
        db.execute("UPDATE meta SET value='2' WHERE key='schema_version'")
        db.execute("UPDATE meta SET value='0.9.0' WHERE key='written_by'")
        db.execute("DROP TABLE kept")
    study.server = study_server(study)
    with pytest.raises(NewerFormatError, match="the journal has format 2") as refused:
        study.server.start()
    study.server.close()
    assert "0.9.0 or later" in refused.value.fix
    assert json.loads((study.runs / "job" / "job.json").read_text("utf-8"))["state"] == "running"
    with sqlite3.connect(journal) as db:
        assert not db.execute("SELECT 1 FROM sqlite_master WHERE name='kept'").fetchall(), "the journal was changed"
        db.execute("UPDATE meta SET value='1' WHERE key='schema_version'")
    study.start()
    at_once([study.site(name) for name in study.sites], lambda site: site.take_part(W, lambda task: W))
    assert study.server.wait_for_job("job", 30)


def study_server(study: Study) -> Any:
    from fl_adapters.cli.federation.server import read_job
    from fl_runtime.server.federation.federation import FederationServer

    return FederationServer(read_kit(study.kits / "server", kind="server"), study.runs, read_job, listen="127.0.0.1:0")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of this version of every kind, which a test copies from."""
    folder = tmp_path_factory.mktemp("later")
    with Study(folder) as study:
        study.job("done", rounds=1)
        at_once([study.site(name) for name in study.sites], lambda site: site.take_part(W, lambda task: W))
        assert study.server.wait_for_job("done", 30)
    back_up(folder / "runs", folder / "backup", "study")
    return folder


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(NewerFormatError) as refused:
        read()
    assert "nothing was changed" in refused.value.fix and refused.value.where
    return refused.value.what


def test_a_data_folder_and_a_backup(plain: Path, tmp_path: Path) -> None:
    rewrite(plain / "backup" / "backup.json", **LATER)
    assert "the backup has format 2" in refusal(lambda: read_backup(plain / "backup"))
    assert "the backup has format 2" in refusal(lambda: restore(plain / "backup", tmp_path / "data", "study"))
    assert not (tmp_path / "data").exists()
    rewrite(plain / "runs" / "federation.json", **LATER)
    before = digest_of(plain / "runs")
    study = Study.__new__(Study)
    study.kits, study.runs = plain / "kits", plain / "runs"
    assert "the data folder has format 2" in refusal(lambda: study_server(study))
    assert digest_of(plain / "runs") == before
    rewrite(plain / "runs" / "federation.json", format=1)


def test_a_kit_of_any_participant(plain: Path, tmp_path: Path) -> None:
    authority = Authority(plain / "kits" / "authority")
    kit = tmp_path / "north"
    kit.mkdir(mode=0o700)
    for file in (plain / "kits" / "north").iterdir():
        if file.is_file():
            (kit / file.name).write_bytes(file.read_bytes())
            (kit / file.name).chmod(0o600)
    rewrite(kit / "kit.json", **LATER)
    digests = {name: hashlib.sha256((kit / name).read_bytes()).hexdigest() for name in ("kit.json", "ca.pem")}
    (kit / "manifest.json").write_text(json.dumps({"format": 1, "files": digests}), "utf-8")
    (kit / "manifest.sig").write_bytes(authority.sign((kit / "manifest.json").read_bytes()))
    assert "the kit has format 2" in refusal(lambda: read_kit(kit))
    assert "the startup kit has format 2" in refusal(lambda: read_script_kit(kit))


def test_lists_that_the_authority_signs(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(plain / "kits" / "authority")
    roots = authority.roots
    monkeypatch.setattr("fl_runtime.trust.project._FORMAT", 2)
    (plain / "kits" / "authority" / "members.json").unlink()
    members = signed_members(authority)
    monkeypatch.setattr("fl_runtime.trust.roots.outside.FORMAT", 2)
    outside = signed_outside(authority.oldest_root.key, "study", 1, [])
    monkeypatch.undo()
    assert "the list of members has format 2" in refusal(lambda: read_members(members, "study", "members.json", roots))
    text = refusal(lambda: read_outside(outside, "study", [roots], "outside.json"))
    assert "the list of outside authorities has format 2" in text


def test_the_privacy_ledger(tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    file = tmp_path / "privacy.sqlite"
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA user_version=2")
        db.execute("DROP TABLE spent")
    assert "the privacy ledger has format 2" in refusal(lambda: Ledger(tmp_path))
    with sqlite3.connect(file) as db:
        assert not db.execute("SELECT name FROM sqlite_master").fetchall(), "the ledger was changed"


def test_the_jobs_of_a_site(tmp_path: Path) -> None:
    settings = {"name": "tumour", "sites": ["north"], "min_sites": 1}
    folder = JobFolder(tmp_path / "jobs" / "tumour")
    folder.write(Assignment("tumour", "train", "", 0, 1, settings), "running")
    check_state(tmp_path)
    rewrite(folder.path / "site.json", **LATER)
    assert "the job has format 2" in refusal(lambda: check_state(tmp_path))
    (folder.path / "site.json").write_text("no JSON", "utf-8")
    check_state(tmp_path)  # damage is no later version: the daemon goes on


def test_saved_states(tmp_path: Path) -> None:
    file = tmp_path / "00000001.safetensors"
    write_state(file, {"turn": 3, "held_back": {"w": W["w"]}})
    assert read_state(file)["turn"] == 3
    arrays = read_tensors(file)
    later = ["format", 2, "0.9.0", {"new": "structure"}]
    write_tensors(file, {**arrays, "json": np.frombuffer(json.dumps(later).encode(), np.uint8)}, {})
    before = file.read_bytes()
    assert "the saved state has format 2" in refusal(lambda: read_state(file))
    assert file.read_bytes() == before


def test_a_journal_of_a_simulation_with_a_setting_that_is_unknown_here(tmp_path: Path) -> None:
    from federation_bench import settings

    path = tmp_path / "journal.sqlite"
    journal = Journal.in_file(path)
    journal.begin(settings())
    journal.close()
    with sqlite3.connect(path) as db:
        fields = json.dumps({**asdict(settings()), "warmth": 3})
        db.execute("UPDATE meta SET value=? WHERE key='job'", (fields,))
    journal = Journal.in_file(path)
    assert "the run has the settings warmth" in refusal(lambda: journal.begin(settings()))
    journal.close()


def test_the_common_ckks_key(tmp_path: Path) -> None:
    pytest.importorskip("tenseal")
    from fl_runtime.filters.ckks import HomomorphicCKKS
    from fl_runtime.filters.ckks_key import read_key

    file = tmp_path / "ckks.key"
    file.write_bytes(b"fl-adapters ckks key 2\n" + bytes(100))
    file.chmod(0o600)
    assert "the key is of another format" in refusal(lambda: read_key(file, HomomorphicCKKS()))


def test_the_record_of_renewed_certificates(tmp_path: Path) -> None:
    file = tmp_path / "renewals.json"
    file.write_text(json.dumps({**LATER, "newest": {}}))
    assert "the record of renewed certificates has format 2" in refusal(lambda: Renewals(file))
    assert json.loads(file.read_text()) == {**LATER, "newest": {}}


def test_an_audit_log_is_neither_continued_nor_called_edited(plain: Path, tmp_path: Path) -> None:
    kit = plain / "kits" / "north"
    log = AuditLog(tmp_path, kit)
    log.write("looked")
    log.close()
    line = json.loads((tmp_path / "audit.jsonl").read_text())
    (tmp_path / "audit.jsonl").write_text(json.dumps({**line, "format": 2, "chain": "another"}) + "\n")
    before = digest_of(tmp_path)
    assert "the audit log has format 2" in refusal(lambda: AuditLog(tmp_path, kit))
    assert "the audit log has format 2" in refusal(lambda: verify(tmp_path, Anchor(kit=kit)))
    assert digest_of(tmp_path) == before
