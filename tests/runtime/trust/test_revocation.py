"""Revocation lists reach the server, the sites and the admins, hold all of them, and never go back."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site, at_once, started
from study import Study, asked, project, readdressed, until
from tcp_proxy import TcpProxy
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_adapters.cli.doctor.kit_checks import kit_checks
from fl_runtime.client import kit_transport
from fl_runtime.client.control import ControlClient
from fl_runtime.client.kit_transport import KitTransport
from fl_runtime.client.roots import RenewingTransport, take_up_new_roots
from fl_runtime.errors import ConfigError, ConnectionLostError, FederationError, PermissionDeniedError
from fl_runtime.server.federation import renewals
from fl_runtime.server.federation.roots import install_package
from fl_runtime.transport.grpc import GrpcServer
from fl_runtime.transport.tls import FileCredentials
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.certificates import is_issued_by, pem_list
from fl_runtime.trust.kits import read_kit, write_kit
from fl_runtime.trust.revocation import RevocationList, read_list
from fl_runtime.trust.roots import rotation
from fl_runtime.trust.streams.identity import StreamIdentity
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

W = {"w": np.zeros(4, np.float32)}
JOIN = pb.JoinRequest(protocol_min=1, protocol_max=1).SerializeToString()


class Impostor:
    """A server with any kit, which keeps what it is asked and answers with what it is told."""

    def __init__(self, kit: Path, answers: dict[str, bytes] | None = None) -> None:
        self.asked: list[str] = []
        self._answers = answers or {}
        self._server = GrpcServer(self, None, 4, 2, FileCredentials(kit))
        self.address = self._server.start("127.0.0.1", 0)

    def handle(self, method: str, peer: object, requests: Iterator[bytes]) -> Iterator[bytes]:
        self.asked.append(method)
        yield self._answers.get(method, b"{}")

    def close(self) -> None:
        self._server.stop(0)


@pytest.fixture
def stolen(study: Study, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The server's kit, whose key was stolen. The server has another key since, and sites and admins the list."""
    monkeypatch.setattr(kit_transport, "LIST_S", 0.0)
    thief = study.folder / "stolen"
    shutil.copytree(study.kits / "server", thief)
    study.server.close()
    shutil.rmtree(study.kits / "server")
    study.authority.revoke("server")
    write_kit(study.kits / "server", study.authority, study.authority.project.participant("server"))
    study.start()
    for name in ("north", "ada"):
        assert asked(study.kits / name, study.address)
    return thief


def test_a_server_with_a_revoked_certificate_gets_no_call(study: Study, stolen: Path) -> None:
    impostor = Impostor(stolen)
    for name, method, message in (("north", "Join", JOIN), ("north", "Assignment", b"{}"), ("ada", "Status", b"{}")):
        with pytest.raises(PermissionDeniedError, match="certificate of the server at .* was revoked"):
            asked(study.kits / name, impostor.address, method, message)
    site = Site("north", KitTransport(study.kits / "north", impostor.address), 5.0)
    with pytest.raises(PermissionDeniedError, match="was revoked"):
        site.join()
    assert impostor.asked == []
    site.vanish()
    impostor.close()


def test_a_thief_in_the_middle_cannot_let_the_real_server_be_looked_at_first(study: Study, stolen: Path) -> None:
    """The first connection reaches the real server, which is looked up there; all later ones reach the thief."""
    impostor = Impostor(stolen)
    with TcpProxy(study.address) as middle:
        transport = KitTransport(study.kits / "north", middle.address)
        look_up = transport._grpc._way

        def and_then_the_thief(*args: Any) -> Any:
            middle.target = study.address
            found = look_up(*args)
            middle.target = impostor.address
            return found

        transport._grpc._way = and_then_the_thief  # type: ignore[method-assign]
        with pytest.raises(ConnectionLostError):
            list(transport.call("Join", JOIN))
        assert middle.connections >= 2, "the lookup, and gRPC's own"
        transport.close()
    assert impostor.asked == []
    impostor.close()


def test_a_silent_first_server_is_passed_over_when_its_certificate_is_looked_up(study: Study, stolen: Path) -> None:
    """It accepts connections and says nothing of TLS, as behind a proxy whose server is away."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    listener.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        silent = f"127.0.0.1:{listener.getsockname()[1]}"
        client = ControlClient(KitTransport(study.kits / "north", [silent, study.address]))
        assert client.ask("Status", patience_s=20)["sites"]
        client.close()
        listener.shutdown(socket.SHUT_RDWR)


def test_a_list_that_comes_during_a_run_ends_the_trust_in_its_server(study: Study, monkeypatch: Any) -> None:
    monkeypatch.setattr(kit_transport, "LIST_S", 0.0)
    impostor = Impostor(study.kits / "server", {"Status": b'{"fine": true}'})
    transport = KitTransport(study.kits / "north", impostor.address)
    assert list(transport.call("Status", b"{}"))
    study.authority.revoke("server")
    shutil.copy(study.authority.folder / "crl.pem", study.kits / "north/crl.pem")
    with pytest.raises(PermissionDeniedError, match="was revoked"):
        transport.call("Status", b"{}")
    transport.close()
    impostor.close()


def test_a_list_in_a_kit_never_goes_back(study: Study, stolen: Path) -> None:
    kit = study.kits / "north"
    newest = (kit / "crl.pem").read_bytes()
    assert read_list(newest, study.authority.pem, "").serials == study.server._guard._validity.revoked.serials
    for name in ("server", "north", "ada"):
        place = study.kits / name / "crl.pem"
        place.write_bytes((stolen / "crl.pem").read_bytes())
        with pytest.raises(ConfigError, match="is older than the one in force") as caught:
            opened(study, name)
        assert caught.value.where == str(place)
        place.unlink()
        with pytest.raises(ConfigError, match="revocation list is missing"):
            opened(study, name)
        place.write_bytes(newest)
        opened(study, name)


def opened(study: Study, name: str) -> None:
    """Open a kit as a starting process does."""
    if name == "server":
        study.server.close()
        study.start()
    else:
        KitTransport(study.kits / name, study.address).close()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("older", "list is older than the one of this kit"),
        ("forged", "was not taken: this is not a revocation list signed by this federation"),
        (b"[" * 2_000, ""),
        (b"[]", ""),
        (b'{"crl": 5}', "was not taken"),
    ],
    ids=["older", "forged", "deep", "no object", "a number"],
)
def test_a_hostile_server_cannot_change_the_list(
    study: Study, caplog: Any, monkeypatch: Any, answer: Any, says: str
) -> None:
    kit, forger = study.kits / "north", Authority.create(study.folder / "forger", project())
    older = (kit / "crl.pem").read_text()
    study.authority.revoke("south")
    shutil.copy(study.authority.folder / "crl.pem", kit / "crl.pem")
    if isinstance(answer, str):
        crl = older if answer == "older" else forger.crl.decode()
        answer = json.dumps({"number": "1", **({"crl": crl} if answer == "forged" else {})}).encode()
    hostile = Impostor(study.kits / "server", {"Revocations": answer})
    transport = KitTransport(kit, hostile.address)
    monkeypatch.setattr(kit_transport, "LIST_S", 0.0)
    for _ in range(2):
        assert list(transport.call("Status", b"{}")) == [b"{}"]
    assert len(caplog.records) == bool(says), "said once"
    assert says in caplog.text
    assert (kit / "crl.pem").read_bytes() == study.authority.crl
    transport.close()
    hostile.close()


def test_a_revoked_sites_stream_key_is_refused(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit_transport, "LIST_S", 0.0)
    message = StreamIdentity(study.kits / "north").signed(b"k" * 32, "south", "1.1|tracker")
    assert StreamIdentity(study.kits / "south").checked(message, "north", "1.1|tracker") == b"k" * 32
    _, crl = study.authority.revoke("north")
    study.admin().ask("Revoke", crl=crl.decode())
    asked(study.kits / "south", study.address)
    with pytest.raises(ConnectionLostError, match="certificate of the site north that was revoked"):
        StreamIdentity(study.kits / "south").checked(message, "north", "1.1|tracker")


def test_an_older_server_without_lists_is_served_as_before(study: Study) -> None:
    """It refuses the call as unknown. Kits of that time have no list."""
    for name in ("crl.pem", "crl.number"):
        (study.kits / "north" / name).unlink()

    class Older(Impostor):
        def handle(self, method: str, peer: object, requests: Iterator[bytes]) -> Iterator[bytes]:
            if method == "Revocations":
                raise PermissionDeniedError("may not call Revocations")
            yield from super().handle(method, peer, requests)

    older = Older(study.kits / "server")
    transport = KitTransport(study.kits / "north", older.address)
    assert list(transport.call("Status", b"{}")) == [b"{}"]
    assert not (study.kits / "north/crl.pem").exists()
    transport.close()
    older.close()


# -- the server ----------------------------------------------------------------------------------------------------


def test_a_running_server_keeps_its_list_when_the_file_is_replaced_by_an_older_one(study: Study, caplog: Any) -> None:
    place = study.kits / "server/crl.pem"
    older = place.read_bytes()
    _, crl = study.authority.revoke("north")
    study.admin().ask("Revoke", crl=crl.decode())
    with caplog.at_level(logging.WARNING):
        place.write_bytes(older)
        until(lambda: "is older than the one in force" in caplog.text, "the warning")
        place.unlink()
        until(lambda: "list is missing" in caplog.text, "the warning")
    assert caplog.text.count("is older than") == 1
    with pytest.raises(PermissionDeniedError, match="revoked"):
        study.site("north").join()


def test_a_revocation_that_could_not_be_sent_is_sent_again(study: Study) -> None:
    words = ["cert", "revoke", "north", "--authority", str(study.authority.folder)]
    words += ["--kit", str(readdressed(study, "ada")), "--json"]
    study.server.close()
    failed = CliRunner().invoke(app, words)
    assert failed.exit_code == 1
    error = json.loads(failed.stdout.splitlines()[-1])["error"]
    assert "the list is signed, but the server does not have it" in error["what"]
    assert "run the same command again" in error["fix"]

    study.start(study.address)
    assert asked(study.kits / "north", study.address)["you"].startswith("fl-adapters://study/site/north")
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout.splitlines()[-1]) == {"serials": [], "server": {"ended": ["north"]}}
    with pytest.raises(PermissionDeniedError, match="revoked"):
        study.site("north").join()

    unknown = CliRunner().invoke(app, ["cert", "revoke", "nobody", "--authority", str(study.authority.folder)])
    assert "'nobody' never had a certificate" in unknown.output


def test_lists_have_growing_numbers_whatever_happens_to_the_folder(study: Study) -> None:
    numbers = [read_list(study.authority.sign_list(), study.authority.pem, "").number for _ in range(3)]
    assert numbers == sorted(set(numbers))
    backup = (study.authority.folder / "crl.pem").read_bytes()
    newest = read_list(study.authority.sign_list(), study.authority.pem, "").number
    (study.authority.folder / "crl.pem").write_bytes(backup)
    until(lambda: read_list(study.authority.sign_list(), study.authority.pem, "").number > newest, "a higher number")


def short_list(study: Study, seconds: float) -> bytes:
    """Sign a list that counts for so many seconds."""
    shorter = study.authority.project.model_copy(update={"crl_days": seconds / 86_400})
    before, study.authority.project = study.authority.project, shorter
    try:
        return study.authority.sign_list()
    finally:
        study.authority.project = before


def test_after_its_end_a_list_lets_nothing_begin_and_running_jobs_go_on(study: Study, caplog: Any) -> None:
    study.job(rounds=1)
    sites = [study.site(name) for name in study.sites]
    tasks = started(sites, W)
    with caplog.at_level(logging.WARNING):
        study.admin().ask("Revoke", crl=short_list(study, 4).decode())
        until(lambda: "the revocation list ends on" in caplog.text, "the warning before its end")
        assert "cert crl --authority FOLDER --kit KIT" in caplog.text
        until(lambda: "the revocation list ended on" in caplog.text, "the warning after its end")
    for call in (lambda: study.site("north").join(), lambda: study.job("second")):
        with pytest.raises(PermissionDeniedError, match="can begin nothing: .* list ended on"):
            call()
    at_once(sites, lambda site: finish(site, tasks[site.name]))
    assert study.server.wait_for_job("job", 30)
    assert study.server.outcome("job")["error"] is None

    done = CliRunner().invoke(
        app,
        ["cert", "crl", "--authority", str(study.authority.folder), "--kit", str(readdressed(study, "ada")), "--json"],
    )
    assert done.exit_code == 0, done.output
    assert study.job("third")
    actions = [entry["action"] for entry in study.log()]
    assert actions.index("revocation list ends soon") < actions.index("revocation list ended")


def finish(site: Site, task: Any) -> None:
    site.submit(task, W)
    site.client.next_task()
    site.client.leave("done", early=False)


def test_a_site_does_not_begin_on_a_list_that_has_ended(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile server may keep newer lists back: a site then notices at the end of the one that it has."""
    (study.kits / "north/crl.pem").write_bytes(short_list(study, 0.5))
    hostile = Impostor(study.kits / "server")
    transport = KitTransport(study.kits / "north", hostile.address)
    current = transport._revoked.current
    assert current is not None
    until(lambda: current.has_ended, "its end")
    for method in ("Join", "Assignment"):
        with pytest.raises(PermissionDeniedError, match="list ended on .* nobody can tell"):
            transport.call(method, b"")
    assert not {"Join", "Assignment"} & set(hostile.asked)
    transport.close()
    hostile.close()
    study.admin().ask("Revoke", crl=study.authority.sign_list().decode())
    assert "sites" in asked(study.kits / "north", study.address), "the server had a newer one"
    assert not RevocationList(study.kits / "north/crl.pem", study.authority.pem).current.has_ended  # type: ignore[union-attr]


def test_an_error_of_the_list_is_one_of_ours(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority", project())
    write_kit(tmp_path / "north", authority, authority.project.participant("north"))
    for damage in (b"", b"-----BEGIN X509 CRL-----\n", authority.pem):
        (tmp_path / "north/crl.pem").write_bytes(damage)
        with pytest.raises(FederationError):
            KitTransport(tmp_path / "north", "127.0.0.1:1")
    (tmp_path / "north/crl.pem").write_bytes(authority.crl)
    (tmp_path / "north/crl.number").write_text("many")
    with pytest.raises(ConfigError, match="number of the newest revocation list cannot be read"):
        KitTransport(tmp_path / "north", "127.0.0.1:1")


def test_doctor_says_until_when_the_list_counts(study: Study) -> None:
    def check(name: str) -> Any:
        return next(check for check in kit_checks(study.kits / name) if check.name == "revocation list")

    for name in ("server", "north", "ada"):
        assert check(name).status == "ok"
    (study.kits / "server/crl.pem").write_bytes(short_list(study, 0.2))
    until(lambda: check("server").status == "problem", "its end")
    assert "cert crl" in check("server").fix
    (study.kits / "north/crl.pem").unlink()
    assert "is missing" in check("north").detail


def test_during_a_rotation_old_certificates_and_lists_of_the_old_root_count(study: Study, monkeypatch: Any) -> None:
    """A second copy of a kit has not heard of the new root, while the first one calls under it."""
    monkeypatch.setattr(renewals, "GRACE", timedelta(0))
    monkeypatch.setattr(kit_transport, "LIST_S", 0.0)
    kit, copy = study.kits / "north", study.folder / "copy"
    shutil.copytree(kit, copy)
    assert asked(copy, study.address)
    authority = rotation.begin(study.authority)
    install_package(study.kits / "server", rotation.read_package(authority.folder / rotation.PACKAGE))
    transport = KitTransport(kit, study.address)
    assert take_up_new_roots(kit, transport)
    transport.close()
    assert is_issued_by(read_kit(kit).certificate.pem, authority.pem)
    assert asked(kit, study.address)
    assert asked(copy, study.address), "its certificate is of the old root, which still counts"

    authority.revoke("south")
    study.admin().ask("Revoke", crl=authority.crl.decode())
    for each in (kit, copy):
        assert asked(each, study.address)
        assert (each / "crl.pem").read_bytes() == authority.crl
        message = StreamIdentity(study.kits / "south").signed(b"k" * 32, "north", "1.1|tracker")
        with pytest.raises(ConnectionLostError, match="south that was revoked"):
            StreamIdentity(each).checked(message, "south", "1.1|tracker")


def test_a_process_that_lives_through_a_whole_rotation_is_held_to_the_newest_list(
    study: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kit_transport, "LIST_S", 0.0)
    kit, idle = study.kits / "north", readdressed(study, "ada")
    site = RenewingTransport.of_kit(kit, study.address)
    assert list(site.call("Status", b"{}"))
    authority = rotation.begin(study.authority)
    study.admin().ask("HandOutRoots", package=rotation.read_package(authority.folder / rotation.PACKAGE))
    until(lambda: is_issued_by(read_kit(kit).certificate.pem, authority.pem), "the new root in the kit")
    assert {check.name: check.status for check in kit_checks(idle)}["clock"] == "ok", "doctor takes it up, too"
    assert is_issued_by(read_kit(idle).certificate.pem, authority.pem)
    words = ["--authority", str(authority.folder), "--kit", str(idle), "--json"]
    without = [word for name in ("olga", "lena", "lars", "mina", "south") for word in ("--without", name)]
    done = CliRunner().invoke(app, ["authority", "finish", *words, *without])
    assert done.exit_code == 0, done.output
    until(lambda: len(pem_list(read_kit(kit).folder.joinpath("ca.pem").read_bytes())) == 1, "one root in the kit")
    assert list(site.call("Status", b"{}"))

    done = CliRunner().invoke(app, ["cert", "revoke", "south", *words])
    assert done.exit_code == 0, done.output
    assert list(site.call("Status", b"{}"))
    assert (kit / "crl.pem").read_bytes() == authority.crl
    site.close()
    assert not caplog.records
    shown = CliRunner().invoke(app, ["cert", "list", *words[:2], "--json"])
    rows = json.loads(shown.stdout.splitlines()[-1])["certificates"]
    retired = [row for row in rows if row["state"] == "of a root that was retired"]
    assert {"north", "server"} <= {row["name"] for row in retired}
    assert not any(row["counts"] for row in retired)
    assert [row["name"] for row in rows if row["counts"]].count("north") == 1
