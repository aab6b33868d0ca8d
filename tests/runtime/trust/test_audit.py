"""The audit log: its content, and that no line can be edited, removed, added or moved unnoticed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from federation_bench import started
from study import Study, project
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_runtime.errors import ConfigError
from fl_runtime.trust.audit import Anchor, AuditLog, entries, verify
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import write_kit

W = {"w": np.zeros(2, np.float32)}
LINES = 12


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A site's kit whose log has LINES lines."""
    authority = Authority.create(tmp_path / "authority", project())
    for name in ("north", "south"):
        write_kit(tmp_path / name, authority, authority.project.participant(name))
    log = AuditLog(tmp_path / "north", tmp_path / "north")
    for number in range(LINES):
        log.write("update", round=number, metrics={"loss": number / 3}, names=["ä\n", "\u2028"])
    return tmp_path / "north"


def lines(kit: Path) -> list[bytes]:
    return (kit / "audit.jsonl").read_bytes().splitlines(keepends=True)


def put(kit: Path, content: list[bytes]) -> None:
    (kit / "audit.jsonl").write_bytes(b"".join(content))


def test_a_log_that_nobody_touched_is_good(kit: Path) -> None:
    assert verify(kit, Anchor(kit=kit)) == (LINES, [])
    done = CliRunner().invoke(app, ["audit", "verify", str(kit), "--kit", str(kit), "--json"])
    assert done.exit_code == 0
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer == {"ok": True, "lines": LINES, "signer": "site north of north-hospital", "findings": []}


@pytest.mark.parametrize("number", range(LINES))
def test_an_edited_removed_or_moved_line_is_found_whichever_it_is(kit: Path, number: int) -> None:
    good = lines(kit)
    edited = good[:]
    edited[number] = good[number].replace(b'"round": ', b'"round": 7')
    swapped = good[:]
    swapped[number], swapped[number - 1] = good[number - 1], good[number]
    twice = [*good[: number + 1], good[number], *good[number + 1 :]]
    for harm in (edited, good[:number] + good[number + 1 :], good[:number], swapped, twice):
        put(kit, harm)
        _, findings = verify(kit, Anchor(kit=kit))
        assert findings
    put(kit, edited)
    assert verify(kit, Anchor(kit=kit))[1][0].line == number + 1


def test_any_changed_byte_is_found(kit: Path) -> None:
    good = (kit / "audit.jsonl").read_bytes()
    draw = random.Random(5)
    for _ in range(200):
        at = draw.randrange(len(good))
        if good[at : at + 1] in b" \n":  # white space between JSON's parts says nothing
            continue
        harm = bytearray(good)
        harm[at] ^= 1 << draw.randrange(7)
        if json_lines(bytes(harm)) == json_lines(good):
            continue
        (kit / "audit.jsonl").write_bytes(harm)
        assert verify(kit, Anchor(kit=kit))[1], (at, good[at - 20 : at + 20])


def json_lines(data: bytes) -> object:
    try:
        return [json.loads(line) for line in data.splitlines()]
    except ValueError:
        return None


def test_a_log_written_anew_lacks_the_signature(kit: Path) -> None:
    other = kit.parent / "south"
    forged = AuditLog(other, other)
    for number in range(LINES):
        forged.write("update", round=number)
    for name in ("audit.jsonl", "audit.head"):
        (kit / name).write_bytes((other / name).read_bytes())
    (mixed,) = verify(kit, Anchor(authority=kit / "ca.pem"))[1]
    assert "log-counter.json was signed by site north of north-hospital, audit.head by site south" in mixed.what
    head, counter = verify(kit, Anchor(kit=kit))[1]
    assert "was not signed by site north of north-hospital, but by site south" in head.what
    assert "log-counter.json" in counter.what


def test_a_missing_head_or_log_is_said(kit: Path) -> None:
    (kit / "audit.head").unlink()
    assert "audit.head" in verify(kit, Anchor(kit=kit))[1][0].what
    (kit / "audit.jsonl").unlink()
    with pytest.raises(ConfigError, match="no audit log here"):
        verify(kit, Anchor(kit=kit))


def test_threads_and_processes_write_one_chain(kit: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fl_runtime.trust.audit import AuditLog\n"
        "log = AuditLog(Path(sys.argv[1]), Path(sys.argv[1]))\n"
        "for n in range(25): log.write('from a process', n=n)\n"
    )
    import fl_runtime

    environment = os.environ | {"PYTHONPATH": str(Path(fl_runtime.__file__).parents[1])}
    others = [subprocess.Popen([sys.executable, "-c", code, str(kit)], env=environment) for _ in range(2)]
    log = AuditLog(kit, kit)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: log.write("from a thread", n=n), range(50)))
    assert [process.wait(60) for process in others] == [0, 0]
    assert verify(kit, Anchor(kit=kit)) == (LINES + 100, [])


def test_a_process_killed_within_a_line_is_seen_and_does_not_break_the_chain(kit: Path) -> None:
    with open(kit / "audit.jsonl", "ab") as file:
        file.write(b'{"number": 13, "before": "torn')
    AuditLog(kit, kit).write("after the kill")
    _, findings = verify(kit, Anchor(kit=kit))
    assert findings[0].line == LINES + 1
    assert entries_of_whole_lines(kit)[-1]["action"] == "after the kill"


def test_lines_without_a_signature_are_said_when_the_log_is_opened_again(kit: Path) -> None:
    head = (kit / "audit.head").read_bytes()
    AuditLog(kit, kit).write("unsigned")
    for name in ("audit.head", "log-counter.json"):
        (kit / name).write_bytes(head)  # as if it had been killed between line and signature
    assert "1 lines follow the last signed one" in verify(kit, Anchor(kit=kit))[1][0].what
    AuditLog(kit, kit)
    assert entries(kit)[-1]["unsigned_lines"] == 1
    assert verify(kit, Anchor(kit=kit))[1] == []


def entries_of_whole_lines(kit: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in lines(kit) if line.endswith(b"}\n")]


def test_the_server_puts_a_whole_run_on_record(study: Study) -> None:
    study.job(rounds=1)
    sites = [study.site(name) for name in study.sites]
    tasks = started(sites, W)
    for site in sites:
        site.submit(tasks[site.name], W, metrics={"loss": 0.5})
    for site in sites:
        site.client.next_task()
    for site in sites:
        site.client.leave("done", early=False)
    assert study.server.wait_for_job("job", 30)
    records = [(entry["action"], entry["who"].partition("?")[0].rpartition("/")[2]) for entry in study.log()]
    for name in study.sites:
        for action in ("joined", "registered", "task_sent", "update", "left"):
            assert (action, name) in records
    for action, who in (("called SubmitJob", "lena"), ("job started", "lena"), ("job ended", "lena"), ("finished", "")):
        assert (action, who) in records
    update = next(entry for entry in study.log() if entry["action"] == "update")
    assert (update["round"], update["facts"]["status"], update["facts"]["metrics"]) == (1, "used", {"loss": 0.5})
    assert verify(study.kits / "server", Anchor(kit=study.kits / "server"))[1] == []
