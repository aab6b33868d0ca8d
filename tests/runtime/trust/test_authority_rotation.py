"""A rotation of the authority: nobody stops, everybody takes up the new root, and in the end the old one is nothing."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study import Study, project, readdressed, until
from typer.testing import CliRunner

from fl_adapters import connect
from fl_adapters.cli.app import app
from fl_adapters.participant.kit import read_kit as read_script_kit
from fl_adapters.participant.registry import close_sessions
from fl_runtime.client.roots import take_up_new_roots
from fl_runtime.errors import ConfigError, ConnectionLostError, FederationError, PermissionDeniedError
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.certificates import is_issued_by, load
from fl_runtime.trust.kits import install, known_roots, read_kit, take_up_roots, write_kit
from fl_runtime.trust.roots import rotation, staging
from fl_runtime.trust.roots.statements import Statement, offered
from fl_runtime.trust.streams.identity import StreamIdentity

EVERYBODY = ["north", "south", "ada", "olga", "lena", "lars", "mina"]
W = {"w": np.zeros(4, np.float32)}


def run(*args: str | Path) -> tuple[int, dict[str, Any], str]:
    """Run a command, and return its exit status, its JSON and its output."""
    done = CliRunner().invoke(app, [*map(str, args), "--json"])
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return done.exit_code, json.loads(lines[-1]) if lines else {}, done.output


class Rotated(Study):
    """A federation whose admin ada runs the commands of a rotation."""

    def command(self, name: str, *more: str) -> tuple[int, dict[str, Any], str]:
        kit = readdressed(self, "ada")
        return run("authority", name, "--authority", self.authority.folder, "--kit", kit, *more)

    def kit(self, name: str) -> Path:
        return readdressed(self, name)

    def hear(self, *names: str) -> None:
        """Let participants make a call, as `status` does."""
        for name in names:
            transport = self._closed(self._transport_of(self.kit(name)))
            take_up_new_roots(self.kit(name), transport)

    def _transport_of(self, kit: Path) -> Any:
        from fl_runtime.transport.grpc import GrpcTransport
        from fl_runtime.transport.tls import FileCredentials

        return GrpcTransport(self.address, credentials=FileCredentials(kit))

    def status_of(self, name: str) -> Any:
        from fl_runtime.client.control import ControlClient

        return ControlClient(self._closed(self._transport_of(self.kit(name)))).ask("Status")


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Rotated]:
    with Rotated(tmp_path) as study:
        for name in EVERYBODY:  # with the address of the server, from before the rotation
            study.kit(name)
        yield study


def roots_of(kit: Path) -> list[bytes]:
    return [load(each).public_key() for each in _pems(known_roots(kit).roots)]  # type: ignore[misc]


def _pems(pem: bytes) -> list[bytes]:
    end = b"-----END CERTIFICATE-----\n"
    return [part + end for part in pem.split(end) if part.strip()]


def test_a_running_job_goes_on_through_a_whole_rotation(study: Rotated) -> None:
    """Two real sites train; between their rounds the authority rotates, and the old root is retired."""
    study.job(rounds=4, name="job")
    stages = {1: threading.Event(), 2: threading.Event(), 3: threading.Event()}
    reached = {number: threading.Barrier(3, timeout=30) for number in stages}
    results: dict[str, Any] = {}
    before = study.authority.pem

    def site(name: str) -> None:
        kit = study.kit(name)
        try:
            with connect(kit=str(kit)) as session:
                for task in session.tasks(initial=W):
                    if task.round in stages:
                        reached[task.round].wait()
                        assert stages[task.round].wait(30)
                    task.submit({key: value + 1 for key, value in task.arrays.items()}, num_examples=1)
            results[name] = session.arrays["w"]
        finally:
            close_sessions("its script ended before the last round", read_script_kit(kit))

    threads = [threading.Thread(target=site, args=(name,)) for name in study.sites]
    for thread in threads:
        thread.start()
    reached[1].wait()
    status, began, output = study.command("rotate")
    assert status == 0, output
    for name in study.sites:  # through their running sessions: nobody asks on their behalf
        until(lambda name=name: is_issued_by(read_kit(study.kit(name)).certificate.pem, _new(study)), f"{name} to hear")
    stages[1].set()

    reached[2].wait()
    study.hear("olga", "lena", "lars", "mina")
    until(lambda: study.command("status")[1]["missing"] == [], "everybody to be heard from")
    status, ended, output = study.command("finish")
    assert status == 0, output
    assert (len(began["roots"]), len(ended["roots"])) == (2, 1)
    for name in study.sites:
        until(lambda name=name: len(roots_of(study.kit(name))) == 1, f"{name} to forget the old root")
    stages[2].set()

    reached[3].wait()
    stages[3].set()
    for thread in threads:
        thread.join(30)
    assert study.server.wait_for_job("job", 30)
    outcome = study.server.outcome("job")
    assert outcome["error"] is None
    assert [item["sites"] for item in outcome["rounds"]] == [["north", "south"]] * 4
    for name in study.sites:
        np.testing.assert_array_equal(results[name], np.full(4, 4, np.float32))
    for kit in (study.kits / "server", *map(study.kit, ("north", "south", "ada"))):
        found = read_kit(kit)
        assert found.authority == ended["authority"]
        assert not is_issued_by(found.certificate.pem, before)
    actions = [entry["action"] for entry in study.log()]
    assert actions.count("new roots") == 2
    assert "new root taken up" in actions


def _new(study: Rotated) -> bytes:
    return _pems(Authority(study.authority.folder).roots)[0]


def test_who_was_away_takes_it_up_when_it_is_back_and_the_retired_root_is_nothing(study: Rotated) -> None:
    old_north = study.folder / "old-north"
    shutil.copytree(study.kit("north"), old_north)
    old_authority = study.folder / "old-authority"
    shutil.copytree(study.authority.folder, old_authority)
    assert study.command("rotate")[0] == 0
    study.server.close()
    study.start(study.address)  # the server, too, may be started again

    study.hear(*EVERYBODY[1:])
    status, _, output = study.command("finish")
    assert (status, "not taken up the new root" in output, "north" in output) == (1, True, True)
    assert len(_pems(Authority(study.authority.folder).roots)) == 2

    study.hear("north")  # it has only now come back, with a certificate and a root of before
    assert study.command("finish")[0] == 0
    assert study.status_of("south")["you"].endswith("south-hospital")
    study.hear("north", "south")
    assert len(roots_of(study.kit("north"))) == 1

    transport = study._closed(study._transport_of(old_north))
    with pytest.raises(ConnectionLostError):
        list(transport.call("Status", b"{}"))
    forger = Authority(old_authority)  # whoever has the old key
    stranger = study.stranger(*certificate_by(forger, "ada"), Authority(study.authority.folder).pem)
    with pytest.raises(ConnectionLostError):
        list(stranger.call("Status", b"{}"))
    crl = forger.revoke("south")[1]
    with pytest.raises(ConfigError, match="not a revocation list signed"):
        study_revokes(study, crl)
    with pytest.raises(ConfigError, match="not signed by a root that is trusted here"):
        take_up_roots(study.kit("south"), {"statements": [forged(forger, 9).to_json()], "certificates": []})
    assert not (study.authority.folder / "next").exists()
    assert len(list((study.authority.folder / "retired").iterdir())) == 1


def study_revokes(study: Rotated, crl: bytes) -> None:
    from fl_runtime.client.control import ControlClient

    ControlClient(study._closed(study._transport_of(study.kit("ada")))).ask("Revoke", crl=crl.decode())


def certificate_by(authority: Authority, name: str) -> tuple[bytes, bytes]:
    from study import certificate

    return certificate(authority._key, authority.pem, authority.project.participant(name))


def forged(authority: Authority, number: int, federation: str = "study") -> Statement:
    """A statement by the key of an authority that only its own root counts."""
    root = authority.newest_root
    return Statement.make(root.key, federation, number, [root.pem.decode()], [], "")


def test_open_calls_of_the_retired_root_end(study: Rotated) -> None:
    """A connection that was made before is not a way around."""
    assert study.command("rotate")[0] == 0
    call = study.transport("north").call("Assignment", b"{}")
    until(lambda: study.server._guard._open, "the call to be open")
    names = [word for name in EVERYBODY for word in ("--without", name)]
    assert study.command("finish", *names)[0] == 0
    with pytest.raises(FederationError):
        list(call)
    until(lambda: any("retired" in entry.get("rule", "") for entry in study.log()), "the call to be ended")


@pytest.mark.parametrize("hostile", ["another authority", "another federation", "an old statement", "no certificate"])
def test_a_server_cannot_make_anybody_trust_its_own_root(study: Rotated, hostile: str) -> None:
    kit = study.kit("north")
    other = Authority.create(study.folder / "other", project())
    root, mine = other.newest_root, study.authority.newest_root
    before = {path.name: path.read_bytes() for path in kit.iterdir() if path.is_file()}
    statement = {
        "another authority": forged(other, 1),
        "another federation": forged(study.authority, 1, "elsewhere"),
        "an old statement": forged(study.authority, 0),
        # signed by the trusted root, but the new root's key is certified by nobody
        "no certificate": Statement.make(mine.key, "study", 1, [root.pem.decode(), mine.pem.decode()], [], ""),
    }[hostile]
    offer = {"statements": [statement.to_json()], "certificates": [certificate_by(other, "north")[1].decode()]}
    if hostile == "an old statement":
        assert take_up_roots(kit, offer) is None
    else:
        with pytest.raises(ConfigError):
            take_up_roots(kit, offer)
    after = {path.name: path.read_bytes() for path in kit.iterdir() if path.is_file() and path.name in before}
    assert after == before


def test_a_kit_whose_roots_were_changed_by_hand_is_refused(study: Rotated) -> None:
    assert study.command("rotate")[0] == 0
    study.hear("north")
    kit = study.kit("north")
    other = Authority.create(study.folder / "other", project())
    (kit / "ca.pem").write_bytes(known_roots(kit).roots + other.pem)
    with pytest.raises(ConfigError, match="not what the authority has stated"):
        read_kit(kit)


def test_the_careless_admin_is_stopped_at_each_wrong_step(study: Rotated, tmp_path: Path) -> None:
    status, _, output = study.command("finish")
    assert (status, "no rotation has begun" in output) == (1, True)
    status, _, output = run("authority", "rotate", "--authority", study.authority.folder, "--kit", study.kit("lena"))
    assert (status, "kit of a project admin" in output) == (1, True)
    assert not (study.authority.folder / "next").exists()

    assert run("authority", "rotate", "--authority", study.authority.folder)[0] == 0  # not handed out
    status, _, output = study.command("finish")
    assert (status, "does not know the new root yet" in output) == (1, True)
    status, _, output = run("authority", "finish", "--authority", study.authority.folder)
    assert (status, "without an admin's kit" in output) == (1, True)
    status, _, output = run("authority", "passphrase", "--authority", study.authority.folder, "--remove")
    assert (status, "two keys" in output) == (1, True)
    authority = Authority(study.authority.folder)
    early = authority.renew("north")
    with pytest.raises(ConfigError, match="not signed by this federation's authority"):
        install(study.kit("north"), early, "mail")

    assert study.command("rotate")[0] == 0
    old = (study.authority.folder / "roots.json").read_bytes()
    assert study.command("finish", "--without", "nobody")[0] == 1
    study.hear(*EVERYBODY)
    assert study.command("finish")[0] == 0
    assert study.command("finish")[0] == 0, "again is harmless"
    (tmp_path / "old.json").write_bytes(old)
    status, _, output = run("authority", "install", tmp_path / "old.json", "--kit", study.kits / "server")
    assert (status, "older statement" in output) == (1, True)


def test_by_hand_and_for_those_left_behind(study: Rotated) -> None:
    """Without an admin's kit, and for a site that was away for all of it, a file does what the server does."""
    package = study.authority.folder / "roots.json"
    assert run("authority", "rotate", "--authority", study.authority.folder)[0] == 0
    assert run("authority", "install", package, "--kit", study.kits / "server")[0] == 0
    study.hear("south")  # the running server hands out what was put into its kit
    assert is_issued_by(read_kit(study.kit("south")).certificate.pem, _new(study))
    left = [word for name in EVERYBODY for word in ("--without", name)]
    assert run("authority", "finish", "--authority", study.authority.folder, *left)[0] == 0
    assert run("authority", "install", package, "--kit", study.kits / "server")[0] == 0

    with pytest.raises(FederationError):
        study.status_of("north")
    status, fields, _ = run("authority", "install", package, "--kit", study.kit("north"))
    assert (status, fields["new"], len(fields["roots"])) == (0, True, 1)
    assert study.status_of("north")["you"].endswith("north-hospital")


def test_sites_trust_each_others_streams_while_only_one_of_them_has_heard(study: Rotated) -> None:
    north, south = (StreamIdentity(study.kit(name)) for name in ("north", "south"))
    assert study.command("rotate")[0] == 0
    study.hear("north")
    assert south.checked(north.signed(b"a" * 32, "south", "s"), "north", "s") == b"a" * 32
    assert north.checked(south.signed(b"b" * 32, "north", "s"), "south", "s") == b"b" * 32


def test_who_joins_during_a_rotation_and_a_second_rotation(study: Rotated) -> None:
    assert study.command("rotate")[0] == 0
    authority = Authority(study.authority.folder)
    write_kit(study.folder / "fresh", authority, authority.project.participant("south"))
    assert read_kit(study.folder / "fresh").authority == authority.fingerprint
    study.hear(*EVERYBODY)
    assert study.command("finish")[0] == 0
    study.command("rotate")
    package = rotation.read_package(study.authority.folder / "roots.json")
    assert take_up_roots(study.folder / "fresh", offered(package, "south", 0)) == 3
    assert len(roots_of(study.folder / "fresh")) == 2
    study.hear(*EVERYBODY)
    assert study.command("finish")[0] == 0
    study.hear("north")
    assert read_kit(study.kit("north")).authority == Authority(study.authority.folder).fingerprint


def test_revoking_works_in_every_phase(study: Rotated) -> None:
    revoke = ("cert", "revoke", "--authority", study.authority.folder, "--kit", study.kit("ada"))
    assert run("authority", "rotate", "--authority", study.authority.folder)[0] == 0
    assert run(*revoke, "mina")[0] == 0  # the server has not heard of the new root
    assert study.command("rotate")[0] == 0
    study.hear("north", "south", "olga", "lena", "lars")
    assert run(*revoke, "lars")[0] == 0
    with pytest.raises(PermissionDeniedError, match="revoked"):
        study.status_of("lars")
    status, _, output = study.command("finish")
    assert status == 0, output  # the revoked need not be waited for
    assert run(*revoke, "lena")[0] == 0
    for name in ("lars", "lena"):
        with pytest.raises(FederationError):
            study.status_of(name)
    study.server.close()
    study.start(study.address)
    with pytest.raises(PermissionDeniedError, match="revoked"):
        study.status_of("lena")
    assert study.status_of("south")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def killed_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let the process die at the n-th file that it writes or deletes from now on."""
    left = iter(range(count))

    def counted(real: Any) -> Any:
        def write(*args: Any, **options: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return real(*args, **options)

        return write

    from fl_runtime.trust import authority as authorities
    from fl_runtime.trust import files

    for module in (staging, rotation, authorities):
        monkeypatch.setattr(module, "write_file", counted(files.write_file))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(Path, "rmdir", counted(Path.rmdir))


@pytest.mark.parametrize("step", ["begin", "finish", "kit begins", "kit finishes"])
def test_a_step_that_is_killed_anywhere_is_completed_by_the_same_step(step: str, tmp_path: Path) -> None:
    """Every number of written files after which a process can die is tried."""
    folder = tmp_path / "authority"
    authority = Authority.create(folder, project())
    write_kit(tmp_path / "north", authority, authority.project.participant("north"))
    if step != "begin":
        rotation.begin(authority)
    if step == "kit finishes":
        take_up_roots(tmp_path / "north", offered(rotation.read_package(folder / "roots.json"), "north", 0))
        rotation.finish(Authority(folder))

    def perform(at: Path) -> None:
        opened = Authority(at / "authority")
        if step == "begin":
            rotation.begin(opened)
        elif step == "finish":
            if opened.is_rotating:  # else the killed process came as far as to end it
                rotation.finish(opened)
        else:
            take_up_roots(at / "north", offered(rotation.read_package(folder / "roots.json"), "north", 0))

    reference = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-reference")
    perform(reference)
    wanted = facts_of(reference)
    for count in range(200):
        copy = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-{count}")
        with pytest.MonkeyPatch.context() as patches:
            killed_at(patches, count)
            try:
                perform(copy)
            except Killed:
                pass
            else:
                break
        assert read_kit(copy / "north"), "a kit can be read in every state"
        perform(copy)
        assert facts_of(copy) == wanted, count
    assert count >= 3, "the step writes several files"


def facts_of(folder: Path) -> dict[str, Any]:
    """What must be the same however often a step was killed."""
    authority = Authority(folder / "authority")
    package = folder / "authority/roots.json"
    statements = rotation.past_statements(authority.folder)
    kit = read_kit(folder / "north")
    return {
        "rotating": authority.is_rotating,
        "roots": len(_pems(authority.roots)),
        "statements": [(item.number, len(item.roots)) for item in statements],
        "files": sorted(path.name for path in authority.folder.iterdir() if not path.name.startswith(".")),
        "handed out": {name: len(pems) for name, pems in rotation.read_package(package)["certificates"].items()},
        "kit's roots": len(_pems(known_roots(kit.folder).roots)),
        "kit under newest": is_issued_by(kit.certificate.pem, _pems(known_roots(kit.folder).roots)[0]),
        "left over": [path.name for path in folder.rglob(".replacing.json")],
    }
