"""An audit log that somebody cut, deleted or set back keeps a permanent mark, and its verification needs an anchor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from study import Study, project, readdressed
from typer.testing import CliRunner

import fl_runtime
from fl_adapters.cli.app import app
from fl_runtime.errors import ConfigError
from fl_runtime.trust.audit import Anchor, AuditLog, LineMark, Witness, entries, verify
from fl_runtime.trust.audit.lines import Head, digest_of, signed_text
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.certificates import load, read_key, read_request, sign
from fl_runtime.trust.kits import install, make_request, read_kit, write_kit

LINES = 6
LOG, HEAD, COUNTER = "audit.jsonl", "audit.head", "log-counter.json"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", project())


@pytest.fixture
def kit(authority: Authority) -> Path:
    """A site's kit whose log has LINES lines."""
    folder = authority.folder.parent / "north"
    write_kit(folder, authority, authority.project.participant("north"))
    write_lines(AuditLog(folder, folder), LINES)
    return folder


def write_lines(log: AuditLog, count: int) -> None:
    for number in range(count):
        log.write("update", round=number)


def problems(kit: Path, *witnesses: Path) -> list[str]:
    return [finding.what for finding in verify(kit, Anchor(kit=kit), witnesses)[1]]


def cut(kit: Path, left: int) -> None:
    lines = (kit / LOG).read_bytes().splitlines(keepends=True)
    (kit / LOG).write_bytes(b"".join(lines[:left]))


def remove(*names: str) -> Callable[[Path], None]:
    def harm(kit: Path) -> None:
        for name in names:
            (kit / name).unlink()

    return harm


def add_line_of_a_stranger(kit: Path) -> None:
    last = entries(kit)[-1]
    fields = {**last, "number": last["number"] + 1, "before": last["digest"], "action": "forged"}
    del fields["digest"]
    with open(kit / LOG, "a") as file:
        file.write(json.dumps({**fields, "digest": digest_of(fields)}) + "\n")


def replace_last_line(kit: Path) -> None:
    cut(kit, LINES - 1)
    add_line_of_a_stranger(kit)


def forge_head(kit: Path) -> None:
    """Sign a shorter log with a key of one's own, in the name of the site."""
    cut(kit, 2)
    last = entries(kit)[-1]
    forger = kit.parent / "forger"
    write_kit(forger, Authority.create(kit.parent / "another", project()), read_kit(kit).identity)
    log = AuditLog(forger, forger)
    write_lines(log, last["number"])
    for name in (HEAD, COUNTER):
        shutil.copy(forger / name, kit / name)


HARM: dict[str, tuple[Callable[[Path], None], str]] = {
    "the last line": (lambda kit: cut(kit, LINES - 1), f"line {LINES} was removed"),
    "several lines": (lambda kit: cut(kit, 2), f"lines 3 to {LINES} were removed"),
    "all lines": (lambda kit: cut(kit, 0), f"all lines were removed: there were {LINES}"),
    "the log": (remove(LOG), f"all lines were removed: there were {LINES}"),
    "log and head": (remove(LOG, HEAD), f"all lines were removed: there were {LINES}"),
    "the head": (remove(HEAD), "audit.head, which signs the last line, was removed or changed"),
    "the counter": (remove(COUNTER), "log-counter.json, which counts the lines, was removed or changed"),
    "head and counter": (remove(HEAD, COUNTER), "audit.head, which signs the last line, was removed or changed"),
    "a line added": (add_line_of_a_stranger, f"line {LINES + 1} was not written with this kit's key"),
    "a line replaced": (replace_last_line, f"line {LINES} is not the one that was signed"),
    "a head of somebody else": (forge_head, "audit.head, which signs the last line, was removed or changed"),
    "no head but a text": (lambda kit: (kit / HEAD).write_text("[" * 900) and None, "audit.head, which signs"),
}


@pytest.mark.parametrize("name", HARM)
@pytest.mark.parametrize("running", [True, False], ids=["while its process runs", "before a restart"])
def test_damage_leaves_a_mark_that_no_further_line_heals(kit: Path, name: str, running: bool) -> None:
    log = AuditLog(kit, kit)
    harm, text = HARM[name]
    harm(kit)
    log = log if running else AuditLog(kit, kit)
    for _ in range(2):
        write_lines(log, 2)
        assert any("was written over damage at" in problem and text in problem for problem in problems(kit))
    mark = next(entry for entry in entries(kit) if entry["action"] == "audit log damaged")
    if running or name != "a head of somebody else":
        assert mark["number"] >= LINES + 1, "a number that was signed never comes again"
    assert [entry["action"] for entry in entries(kit)].count("audit log damaged") == 1
    cut(kit, len(entries(kit)) - 3)  # the mark itself goes
    write_lines(log, 1)
    assert any("were removed" in problem for problem in problems(kit))


def test_a_counter_that_was_set_back_is_noticed(kit: Path) -> None:
    log = AuditLog(kit, kit)
    before = (kit / COUNTER).read_bytes()
    write_lines(log, 3)
    (kit / COUNTER).write_bytes(before)
    write_lines(log, 1)
    assert "log-counter.json, which counts the lines, was removed or changed" in problems(kit)[0]


def test_a_log_of_an_earlier_version_goes_on_without_a_mark(kit: Path) -> None:
    """Earlier versions wrote neither seals nor a counter."""
    log, before = [], "0" * 64
    for entry in entries(kit):
        fields = {name: value for name, value in entry.items() if name not in ("seal", "digest", "before")}
        fields["before"] = before
        before = digest_of(fields)
        log.append(json.dumps({**fields, "digest": before}))
    (kit / LOG).write_text("\n".join(log) + "\n")
    mark = LineMark(LINES, before)
    signature = sign(read_key((kit / "key.pem").read_bytes()), signed_text(mark))
    (kit / HEAD).write_bytes(Head(mark, signature, (kit / "certificate.pem").read_bytes()).to_bytes())
    (kit / COUNTER).unlink()
    assert problems(kit) == []
    write_lines(AuditLog(kit, kit), 2)
    assert problems(kit) == []
    assert entries(kit)[-1]["number"] == LINES + 2


def test_a_renewed_certificate_with_a_new_key_signs_the_same_log(kit: Path, authority: Authority) -> None:
    log = AuditLog(kit, kit)
    request = make_request(kit)
    install(kit, authority.issue(*read_request(request.read_bytes())), "")
    write_lines(log, 2)
    write_lines(AuditLog(kit, kit), 2)
    assert problems(kit) == []


# -- the anchor ---------------------------------------------------------------------------------------------------


def verify_command(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["audit", "verify", *words])
    return done.exit_code, done.output


def public_key(kit: Path) -> Path:
    key = load((kit / "certificate.pem").read_bytes()).public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (kit.parent / "public.pem").write_bytes(pem)
    return kit.parent / "public.pem"


def test_a_log_is_not_verified_without_somebody_to_trust(kit: Path) -> None:
    code, text = verify_command(str(kit))
    assert code == 1
    assert all(option in text for option in ("--kit", "--authority", "--key"))
    for words in (("--kit", str(kit)), ("--authority", str(kit / "ca.pem")), ("--key", str(public_key(kit)))):
        code, text = verify_command(str(kit), *words)
        assert (code, text) == (0, f"{LINES} lines, nothing is wrong; signed by site north of north-hospital\n")
    assert verify_command(str(kit), "--key", str(kit / "certificate.pem"))[0] == 0
    assert verify_command(str(kit), "--kit", str(kit), "--key", str(public_key(kit)))[0] == 1
    assert "neither a public key nor a certificate" in verify_command(str(kit), "--key", str(kit / "kit.json"))[1]


def test_a_forged_log_passes_no_anchor(kit: Path) -> None:
    """A whole new chain, signed by a new authority's site of the same name."""
    forger = kit.parent / "forger"
    write_kit(forger, Authority.create(kit.parent / "another", project()), read_kit(kit).identity)
    write_lines(AuditLog(forger, forger), LINES)
    key = public_key(kit)
    for anchor in (Anchor(kit=kit), Anchor(authority=kit / "ca.pem"), Anchor(key=key)):
        assert verify(forger, anchor)[1], anchor


def test_an_anchor_is_exactly_one(kit: Path) -> None:
    with pytest.raises(ConfigError, match="exactly one signer that you trust"):
        Anchor()


# -- who notes the lines of whom ----------------------------------------------------------------------------------


def take_part(kit: Path) -> None:
    """Run a command that does not train. What counts here is what `run` tells the server before and after it."""
    assert CliRunner().invoke(app, ["run", "--kit", str(kit), "--", "true"]).exit_code == 1


def test_a_running_process_notices_that_all_files_were_set_back(kit: Path) -> None:
    log = AuditLog(kit, kit)
    before = {name: (kit / name).read_bytes() for name in (LOG, HEAD, COUNTER)}
    write_lines(log, 3)
    for name, data in before.items():
        (kit / name).write_bytes(data)
    write_lines(log, 1)
    assert f"lines {LINES + 1} to {LINES + 3} were removed" in problems(kit)[0]


def test_a_log_deleted_with_its_counter_is_noticed_by_the_other_side(tmp_path: Path) -> None:
    with Study(tmp_path, ("north", "south")) as study:
        study.job("first")
        kit = readdressed(study, "north")
        take_part(kit)
        (noted,) = [entry for entry in study.log() if entry["action"] == "log noted"][-1:]
        assert noted["of"] == read_kit(kit).identity.uri
        assert any(entry["action"] == "log noted" for entry in entries(kit)), "and the site notes the server's"
        remove(LOG, HEAD, COUNTER)(kit)
        assert study.server.wait_for_job("first", 30)
        study.job("second")
        take_part(kit)
        (refusal,) = [entry for entry in study.refusals() if entry["action"] == "log compared"]
        assert f"line {noted['line']['number']} of it was noted before" in refusal["error"]
        own = [entry for entry in entries(kit) if entry["action"] == "log compared"]
        assert "has noted line" in own[0]["error"], "a site learns that it lost its own log"
    assert problems(kit) == []
    assert any("is not the one that" in text for text in problems(kit, study.kits / "server"))
    assert verify_command(str(kit), "--kit", str(kit), "--witness", str(study.kits / "server"))[0] == 1
    server = study.kits / "server"
    assert verify_command(str(server), "--kit", str(server), "--witness", str(kit))[0] == 0


def test_what_a_site_has_noted_of_one_server_is_nothing_to_the_other(tmp_path: Path) -> None:
    """Two servers that stand in for each other have a log each, and a site tells of the one it met last."""
    with Study(tmp_path, ("north", "south")) as study:
        server, site = read_kit(study.kits / "server").identity, read_kit(study.kits / "north").identity
        other = replace(server, name="server-2")
        of_site = Witness(AuditLog(study.kits / "north", study.kits / "north"), study.kits / "north", site)
        of_server = Witness(AuditLog(study.kits / "server", study.kits / "server"), study.kits / "server", server)
        of_site.take({"of": other.uri, "number": 1000, "digest": "0" * 64}, "server")
        of_server.take(of_site.statement(), "site", site)
        assert study.refusals() == []
        of_site.take({"of": server.uri, "number": 1000, "digest": "0" * 64}, "server")
        of_server.take(of_site.statement(), "site", site)
        assert ["has noted line 1000" in line["error"] for line in study.refusals()] == [True]


@pytest.mark.parametrize(
    "statement",
    [
        None,
        7,
        [],
        {"number": 1},
        {"number": -1, "digest": "0" * 64},
        {"number": 2**80, "digest": "0" * 64},
        {"number": 1, "digest": "x" * 64, "of": "fl-adapters://study/site/north?organisation=north-hospital"},
        {"number": 1, "digest": "0" * 64, "of": "fl-adapters://study/site/south?organisation=south-hospital"},
        {"number": 1, "digest": "0" * 64, "of": ["a"]},
        {"number": True, "digest": "0" * 64, "of": "x"},
    ],
    ids=repr,
)
def test_what_is_no_statement_about_a_log_is_not_noted(kit: Path, statement: object) -> None:
    log, own = AuditLog(kit, kit), read_kit(kit).identity
    Witness(log, kit, own).take(statement, "site", own)
    assert [entry["action"] for entry in entries(kit)] == ["update"] * LINES


def test_a_process_that_is_killed_at_any_time_leaves_a_good_log(kit: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fl_runtime.trust.audit import AuditLog\n"
        "log = AuditLog(Path(sys.argv[1]), Path(sys.argv[1])); print('on', flush=True)\n"
        "while True: log.write('again')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fl_runtime.__file__).parents[1])}
    for _ in range(3):
        words = [sys.executable, "-c", code, str(kit)]
        with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.readline()
            process.kill()
    write_lines(AuditLog(kit, kit), 1)
    found = problems(kit)
    assert all("is not an entry" in problem for problem in found), "at most a line that was cut off by the kill"
