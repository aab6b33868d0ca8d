"""Certificates of an outside authority count for the participants that the project file maps them to, and no others."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from federation_bench import Site, at_once, started
from source_tree import ROOT
from study import Study, project, until
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_runtime.client.kit_transport import KitTransport
from fl_runtime.client.roots import take_up_new_roots
from fl_runtime.errors import ConfigError, ConnectionLostError, FederationError, PermissionDeniedError
from fl_runtime.transport.base import Credentials
from fl_runtime.transport.grpc import GrpcServer
from fl_runtime.trust import audit
from fl_runtime.trust.authority import Authority, save_project
from fl_runtime.trust.certificates import key_pem, new_key, read_key
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.kits import install, install_outside, known_roots, read_kit, write_kit
from fl_runtime.trust.project import OutsideEntry, Project, read_project
from fl_runtime.trust.roots import rotation
from fl_runtime.trust.roots.outside import OUTSIDE
from fl_runtime.trust.roots.outside_lists import OUTSIDE_LISTS
from fl_runtime.trust.streams.identity import StreamIdentity
from fl_runtime.version import SERVER_NAME

W = {"w": np.zeros(4, np.float32)}
NORTH_URI = Identity("study", "site", "north", "north-hospital").uri
NORTH, ADA = "dns:fl.north.example", "email:ada@north.example"


class Hospital:
    """A hospital's own PKI: a root and an intermediate authority, with RSA and P-256 keys."""

    def __init__(self, name: str = "North Hospital") -> None:
        self.root_key, self.key = rsa.generate_private_key(65537, 2048), new_key()
        self.root_name, self.name = _name(f"{name} Root"), _name(f"{name} Issuing CA")
        root = self._authority(self.root_name, self.root_name, self.root_key, self.root_key)
        self.bundle = root + self._authority(self.name, self.root_name, self.key, self.root_key)

    def _authority(self, name: x509.Name, issuer: x509.Name, key: Any, signer: Any) -> bytes:
        builder = _builder(name, issuer, key, {"days": 30}).add_extension(x509.BasicConstraints(True, None), True)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        return _pem(builder.add_extension(usage, True).sign(signer, hashes.SHA256()))

    def certificate(
        self,
        *names: str,
        subject: str = "somebody",
        serial: int = 0,
        key: Any = None,
        use: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
        **lifetime: float,
    ) -> tuple[bytes, bytes]:
        """Return a key and a certificate with the names."""
        key = key or new_key()
        kinds = {"dns": x509.DNSName, "email": x509.RFC822Name, "uri": x509.UniformResourceIdentifier}
        also = [kinds[kind](value) for kind, _, value in (name.partition(":") for name in names)]
        builder = _builder(_name(subject), self.name, key, lifetime or {"days": 10}, serial)
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), False)
        if also:
            builder = builder.add_extension(x509.SubjectAlternativeName(also), False)
        return key_pem(key), _pem(builder.sign(self.key, hashes.SHA256()))

    def crl(self, *pems: bytes, hours: float = 24, signed: datetime | None = None) -> bytes:
        """Return the revocation list of the issuing authority."""
        now = signed or datetime.now(UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.name).last_update(now)
        builder = builder.next_update(now + timedelta(hours=hours))
        for pem in pems:
            entry = x509.RevokedCertificateBuilder().serial_number(_serial(pem)).revocation_date(now)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    name: x509.Name, issuer: x509.Name, key: Any, lifetime: dict[str, float], serial: int = 0
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(serial or x509.random_serial_number())
    return builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(**lifetime))


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _serial(pem: bytes) -> int:
    return x509.load_pem_x509_certificate(pem).serial_number


class Mapped(Study):
    """A federation in which north and ada have certificates of a hospital's PKI, and all others those of ours."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kits, self.runs = folder, folder / "kits", folder / "runs"
        self.hospital = Hospital()
        entry = OutsideEntry(certificate=self.hospital.bundle.decode(), names={"north": NORTH, "ada": ADA})
        self.authority = Authority.create(self.kits / "authority", project(outside_authorities=(entry,)))
        for identity in self.authority.project.participants():
            outside = identity.name in ("north", "ada")
            write_kit(self.kits / identity.name, self.authority, identity, with_key=not outside)
        self.certificates = {}
        for name, mapped in (("north", NORTH), ("ada", ADA)):
            key, pem = self.hospital.certificate(mapped)
            install(self.kits / name, pem, "mail", read_key(key))
            self.certificates[name] = pem
        self.sites = ("north", "south")
        self.address, self._listener_of = "", None
        self._things = ExitStack()

    def changed(self, *entries: OutsideEntry) -> Path:
        """Change the outside authorities in the project, and return the new outside.json."""
        fields = {**self.authority.project.model_dump(), "outside_authorities": entries}
        save_project(self.authority.folder, Project(**fields))
        self.authority = self.authority.reopened()
        self.authority.signed_outside()
        return self.authority.folder / OUTSIDE


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Mapped]:
    with Mapped(tmp_path) as study:
        yield study


def status(study: Study, pair: tuple[bytes, bytes]) -> Any:
    return list(study.stranger(*pair).call("Status", b"{}"))


def refusal(study: Study, pair: tuple[bytes, bytes], method: str = "Status") -> FederationError:
    with pytest.raises(FederationError) as caught:
        list(study.stranger(*pair).call(method, b"{}"))
    return caught.value


def test_a_job_with_a_site_and_an_admin_of_an_outside_authority(study: Mapped) -> None:
    assert study.admin("ada").ask("Status")["you"].startswith("fl-adapters://study/admin/ada")
    study.job(by="ada", rounds=1)
    sites = [study.site(name) for name in study.sites]
    tasks = started(sites, W)

    def train(site: Any) -> None:
        site.submit(tasks[site.name], W)
        site.client.next_task()
        site.client.leave("done", early=False)

    at_once(sites, train)
    assert study.server.wait_for_job("job", 30)
    assert study.server.outcome("job")["error"] is None
    with pytest.raises(PermissionDeniedError, match="site north of north-hospital may not"):
        list(study.transport("north").call("SubmitJob", b"{}"))


def test_a_certificate_of_the_same_authority_that_is_nobodys_or_somebody_elses(study: Mapped) -> None:
    hospital = study.hospital
    nobody = refusal(study, hospital.certificate("dns:www.north.example", subject="north"))
    assert isinstance(nobody, PermissionDeniedError)
    assert "stand for no participant: dns:www.north.example, subject:CN=north" in nobody.what
    both = refusal(study, hospital.certificate(NORTH, ADA))
    assert "stand for 2 participants" in both.what
    claims = "uri:" + Identity("study", "admin", "lena", "north-hospital", "project-admin").uri
    posing = refusal(study, hospital.certificate(claims), "Revoke")
    assert "stand for no participant" in posing.what, "a URI of ours counts only if our authority issued it"
    as_site = refusal(study, hospital.certificate(NORTH), "Revoke")
    assert "site north of north-hospital may not" in as_site.what
    nobodys = [entry["rule"] for entry in study.refusals() if not entry["who"]]
    assert nobodys == ["certificate: names of outside authorities"] * 3


def test_a_certificate_that_is_out_of_date_or_for_another_use_or_key(study: Mapped) -> None:
    expired = study.hospital.certificate(NORTH, hours=-1)
    assert isinstance(refusal(study, expired), ConnectionLostError)
    server = study.hospital.certificate(NORTH, use=ExtendedKeyUsageOID.SERVER_AUTH)
    assert isinstance(refusal(study, server), ConnectionLostError)
    key = rsa.generate_private_key(65537, 2048)
    wide = study.hospital.certificate(NORTH, key=key)
    assert "is not for a P-256 key" in refusal(study, wide).what
    other = Hospital()  # with the same names
    assert isinstance(refusal(study, other.certificate(NORTH)), ConnectionLostError)
    with pytest.raises(ConfigError, match="not signed by this federation's authority, or by an outside one"):
        install(study.kits / "north", other.certificate(NORTH)[1], "mail")


def test_an_outside_authority_cannot_pose_as_the_server(study: Mapped) -> None:
    """Its certificates count for those that it is mapped to; sites trust only our own root for the server."""
    asked = []

    class Impostor:
        def handle(self, method: str, peer: object, requests: Iterator[bytes]) -> Iterator[bytes]:
            asked.append(method)
            yield b""

    key, pem = study.hospital.certificate(f"dns:{SERVER_NAME}", use=ExtendedKeyUsageOID.SERVER_AUTH)
    chain = pem + study.hospital.bundle
    credentials = Credentials(key, chain, study.authority.pem + study.hospital.bundle)
    impostor = GrpcServer(Impostor(), None, 2, 2, lambda: credentials)
    address = impostor.start("127.0.0.1", 0)
    for name in ("north", "south"):
        site = Site(name, KitTransport(study.kits / name, address), 0.2)
        with pytest.raises(ConnectionLostError):
            site.join()
        site.vanish()
    assert asked == []
    impostor.stop(0)


def test_revocation_by_issuer_and_serial_number(study: Mapped, tmp_path: Path) -> None:
    """The hospital may use a serial number that our authority has used, too. Revoking one spares the other."""
    south = read_kit(study.kits / "south").certificate
    twin = study.hospital.certificate(NORTH, serial=south.serial)
    assert status(study, twin)
    pem = tmp_path / "twin.pem"
    pem.write_bytes(twin[1])
    words = ["--authority", str(study.authority.folder), "--certificate", str(pem), "--json"]
    other = CliRunner().invoke(app, ["cert", "revoke", "ada", *words])
    assert "this is the certificate of site north" in other.output
    for _ in range(2):
        done = CliRunner().invoke(app, ["cert", "revoke", "north", *words])
        assert done.exit_code == 0, done.output
    study.admin().ask("Revoke", crl=study.authority.crl.decode())
    assert "its certificate was revoked" in refusal(study, twin).what
    assert list(study.transport("south").call("Status", b"{}")), "south's has the same serial number"
    assert list(study.transport("north").call("Status", b"{}")), "north's other certificate counts"

    study.authority.revoke_certificates([south])
    study.admin().ask("Revoke", crl=study.authority.crl.decode())
    again = study.hospital.certificate(ADA, serial=south.serial)
    with pytest.raises(PermissionDeniedError, match="revoked"):
        list(study.transport("south").call("Status", b"{}"))
    assert "its certificate was revoked" in refusal(study, again).what, "the hospital has used that number twice"
    elsewhere = study.hospital.certificate(ADA, serial=read_kit(study.kits / "lena").certificate.serial)
    assert status(study, elsewhere)


def test_the_outside_authoritys_own_list(study: Mapped, caplog: Any) -> None:
    place = study.kits / "server" / OUTSIDE_LISTS
    study.job(by="ada")
    assert study.site("north").join()
    place.write_bytes(study.hospital.crl())
    until(lambda: [e for e in study.log() if "lists of outside" in e["action"]], "the list")
    place.write_bytes(study.hospital.crl(study.certificates["north"]))
    until(lambda: [e for e in study.log() if e["action"] == "calls ended"] or refused(study, "north"), "north's end")
    with pytest.raises(PermissionDeniedError, match="its certificate was revoked"):
        study.site("north").join()
    assert study.admin("ada").ask("Status"), "ada's counts"

    place.write_bytes(study.hospital.crl(signed=datetime.now(UTC) - timedelta(hours=1)))
    until(lambda: "is older than the one in force" in caplog.text, "the warning")
    place.write_bytes(Hospital().crl())
    until(lambda: "not a whole revocation list signed by an outside authority" in caplog.text, "the warning")
    with pytest.raises(PermissionDeniedError, match="its certificate was revoked"):
        study.site("north").join()
    place.write_bytes(study.hospital.crl(hours=0.0003))
    until(lambda: refused(study, "ada", "SubmitJob"), "its end")
    with pytest.raises(PermissionDeniedError, match="the revocation list of its authority, CN=North Hospital Issuing"):
        study.job("second", by="ada")
    assert study.admin("ada").ask("Status")
    assert study.job("third", by="lena"), "whose certificate is ours"


def refused(study: Study, name: str, method: str = "Status") -> bool:
    try:
        list(study.transport(name).call(method, b"{}"))
    except PermissionDeniedError:
        return True
    except FederationError:
        return False
    return False


def test_names_that_the_project_maps_no_more_end_at_once(study: Mapped) -> None:
    study.job(by="ada")
    assert study.site("north").join()
    watch = study.transport("north").call("Roots", json.dumps({"number": 0, "wait": True}).encode())
    open_calls = study.server._guard._open
    until(lambda: any(call.certificate.identity.name == "north" for call in set(open_calls)), "north's open call")
    entry = OutsideEntry(certificate=study.hospital.bundle.decode(), names={"ada": ADA})
    fresh, old = study.changed(entry), (study.kits / "server" / OUTSIDE).read_bytes()
    shown = CliRunner().invoke(app, ["authority", "install", str(fresh), "--kit", str(study.kits / "server"), "--json"])
    assert shown.exit_code == 0, shown.output
    with pytest.raises(FederationError):
        list(watch)
    assert [entry["who"] for entry in study.log() if entry["action"] == "calls ended"] == [NORTH_URI]
    assert "stand for no participant" in refusal(study, study.hospital.certificate(NORTH)).what
    assert study.admin("ada").ask("Status")
    with pytest.raises(ConfigError, match="are older than the kit's"):
        install_outside(study.kits / "server", old, "mail")
    forged = json.loads(fresh.read_text())
    forged["text"] = forged["text"].replace("ada@north.example", "eve@north.example")
    with pytest.raises(ConfigError, match="not signed by this federation's authority"):
        install_outside(study.kits / "server", json.dumps(forged).encode(), "mail")
    (study.kits / "south" / OUTSIDE).write_text(json.dumps(forged))
    with pytest.raises(ConfigError, match="not signed by this federation's authority"):
        read_kit(study.kits / "south")


def test_streams_between_a_site_of_an_outside_authority_and_one_of_ours(study: Mapped) -> None:
    north, south = StreamIdentity(study.kits / "north"), StreamIdentity(study.kits / "south")
    message = north.signed(b"k" * 32, "south", "1.1|tracker")
    assert south.checked(message, "north", "1.1|tracker") == b"k" * 32
    assert north.checked(south.signed(b"j" * 32, "north", "1.1|tracker"), "south", "1.1|tracker") == b"j" * 32
    shutil.copytree(study.kits / "north", study.folder / "posing")
    key, pem = study.hospital.certificate("dns:www.north.example")
    (study.folder / "posing/certificate.pem").write_bytes(pem)
    (study.folder / "posing/key.pem").write_bytes(key)
    with pytest.raises(PermissionDeniedError, match="stand for no participant"):
        StreamIdentity(study.folder / "posing")
    forged = json.loads(message) | {"certificate": pem.decode()}
    with pytest.raises(ConnectionLostError, match="not signed by the site north"):
        south.checked(json.dumps(forged).encode(), "north", "1.1|tracker")
    (study.kits / "south" / OUTSIDE_LISTS).write_bytes(study.hospital.crl(study.certificates["north"]))
    with pytest.raises(ConnectionLostError, match="north that was revoked"):
        south.checked(message, "north", "1.1|tracker")


def test_the_audit_log_of_a_site_with_an_outside_certificate(study: Mapped) -> None:
    kit = study.kits / "north"
    log = audit.AuditLog(kit, kit)
    log.write("something", read_kit(kit).identity)
    key, pem = study.hospital.certificate(NORTH)  # renewed, with another key
    install(kit, pem, "mail", read_key(key))
    log.write("something else")
    log.close()
    again = audit.AuditLog(kit, kit)
    again.write("and more")
    again.close()
    assert audit.verify(kit, audit.Anchor(kit=kit), [study.kits / "server"]) == (3, [])
    problems = audit.verify(kit, audit.Anchor(kit=study.kits / "south"))[1]
    assert any("was not signed by site south" in each.what for each in problems)


def test_a_rotation_of_our_root_waits_for_those_with_outside_certificates(study: Mapped) -> None:
    authority = rotation.begin(study.authority)
    study.admin("ada").ask("HandOutRoots", package=rotation.read_package(authority.folder / rotation.PACKAGE))
    heard = study.admin("ada").ask("HandOutRoots")["taken_up"]
    assert {"north", "ada"} <= set(rotation.not_heard(authority, heard))
    for name in ("north", "ada"):
        assert take_up_new_roots(study.kits / name, study.transport(name))
    heard = study.admin("ada").ask("HandOutRoots")["taken_up"]
    assert not {"north", "ada"} & set(rotation.not_heard(authority, heard))
    rotation.finish(authority)
    study.admin("ada").ask("HandOutRoots", package=rotation.read_package(authority.folder / rotation.PACKAGE))
    assert take_up_new_roots(study.kits / "north", study.transport("north"))
    assert list(study.transport("north").call("Status", b"{}"))
    assert read_kit(study.kits / "north").certificate.pem == study.certificates["north"]
    fresh = study.changed(OutsideEntry(certificate=study.hospital.bundle.decode(), names={"north": NORTH}))
    install_outside(study.kits / "north", fresh.read_bytes(), "mail")
    assert known_roots(study.kits / "north").outside.number > 0
    write_kit(study.folder / "late", study.authority, study.authority.project.participant("south"))
    assert read_kit(study.folder / "late"), "a kit of the new root reads what that root has signed"


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"nobody": NORTH}, "'nobody' is no participant"),
        ({"server": NORTH}, "the server's certificate is always by the federation's own authority"),
        ({"north": "fl.north.example"}, "is not one name in certificates"),
        ({"north": "dns:*.north.example"}, "without a wildcard"),
        ({"north": "subject:north"}, "is not a subject"),
        ({"north": "dns:FL.north.example", "south": NORTH}, "stands for two participants"),
    ],
)
def test_a_project_file_that_maps_wrongly(tmp_path: Path, names: dict[str, str], says: str) -> None:
    entry = {"certificate": Hospital().bundle.decode(), "names": names}
    with pytest.raises(Exception, match="(?s)" + says.replace("*", r"\*")) as caught:
        Project(**{**project().model_dump(), "outside_authorities": [entry]})
    assert says.split()[0] in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "leaf", "no root", "text"])
def test_an_authoritys_file_that_is_none(tmp_path: Path, damage: str) -> None:
    hospital = Hospital()
    contents = {
        "leaf": hospital.certificate(NORTH)[1],
        "no root": hospital.bundle[hospital.bundle.index(b"-----END CERTIFICATE-----") + 26 :],
        "text": b"certificate",
    }
    if damage != "missing":
        (tmp_path / "ca.pem").write_bytes(contents[damage])
    text = project().model_dump_json()
    fields = {**json.loads(text), "outside_authorities": [{"certificate": "ca.pem", "names": {"north": NORTH}}]}
    (tmp_path / "project.yml").write_text(json.dumps(fields))
    with pytest.raises(ConfigError) as caught:
        read_project(tmp_path / "project.yml")
    assert "ca.pem" in str(caught.value)


def test_the_commands_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with openssl and fl-adapters, in their order; step-ca is not installed where the tests run."""
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs/certificates.md").read_text("utf-8").partition("## Certificates of an outside authority")[2]
    (mapped,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    Path("project.yml").write_text(json.dumps(json.loads(project().model_dump_json()) | yaml.safe_load(mapped)))
    authority = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "9"]
    names = ["-subj", "/CN=North Hospital CA", "-keyout", "north-ca.key", "-out", "north-ca.pem"]
    subprocess.run(["openssl", *authority, *names], check=True, capture_output=True, timeout=30)
    ran("provision", "project.yml", "--out", "kits")
    assert not Path("kits/north/key.pem").exists()
    commands = re.findall(r"^\$ (.*)$", section, re.MULTILINE)
    assert len(commands) == 10
    for command in commands:
        if command.startswith("fl-adapters"):
            ran(*shlex.split(command.replace("--kit server", "--kit kits/server"))[1:])
        else:
            subprocess.run(["bash", "-c", command], check=True, capture_output=True, timeout=30)
    for name in ("north", "ada"):
        kit = read_kit(Path("kits") / name)
        assert kit.identity.name == name
        assert kit.certificate.issuer == "CN=North Hospital CA"
    fields = yaml.safe_load(Path("project.yml").read_text())
    fields["outside_authorities"][0]["names"].pop("ada")
    Path("project.yml").write_text(json.dumps(fields))
    told = ran("provision", "project.yml", "--out", "kits")
    assert "the outside authorities have changed: `fl-adapters authority install" in told
    ran("authority", "install", "kits/authority/outside.json", "--kit", "kits/ada")
    with pytest.raises(PermissionDeniedError, match="stand for no participant: email:ada@north.example"):
        read_kit(Path("kits/ada"))


def ran(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.output
