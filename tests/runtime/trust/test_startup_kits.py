"""Startup kits: their content, what is refused, and how they are sent."""

from __future__ import annotations

import base64
import importlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pyzipper
from cryptography import x509
from study import project
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_adapters.extras import needs_trust_extra
from fl_adapters.participant import kit as script_kit
from fl_runtime.errors import ConfigError, PermissionDeniedError
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.kits import read_kit, write_kit
from fl_runtime.trust.project import Project, read_project, split_address
from fl_runtime.trust.provisioning.archive import new_password, read_archive, write_archive

PROJECT = """
federation: study
server: {address: "127.0.0.1:18443"}
sites:
  - {name: north, organisation: north-hospital}
  - {name: south, organisation: south-hospital}
admins:
  - {name: ada@study.org, organisation: north-hospital, role: project-admin}
"""


def command(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    packages = str(Path(script_kit.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": packages}
    line = [sys.executable, "-m", "fl_adapters.cli", *args]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    authority = Authority.create(tmp_path / "authority", project())
    for identity in authority.project.participants():
        write_kit(tmp_path / identity.name, authority, identity)
    return tmp_path


def test_the_command_makes_a_kit_for_everybody_and_leaves_kits_alone_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "project.yml").write_text(PROJECT)
    done = command(tmp_path, "provision", "project.yml", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["kits"]) == {"server", "north", "south", "ada@study.org"}
    before = (tmp_path / "kits/north/key.pem").read_bytes()

    (tmp_path / "project.yml").write_text(PROJECT.replace("admins:", "  - {name: east, organisation: east}\nadmins:"))
    again = json.loads(command(tmp_path, "provision", "project.yml", "--json").stdout)
    assert set(again["kits"]) == {"east"}
    assert again["authority"] == result["authority"]
    assert (tmp_path / "kits/north/key.pem").read_bytes() == before
    assert read_kit(tmp_path / "kits/east").sites == ("north", "south", "east")


def test_a_kit_that_was_sent_away_is_not_made_again_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "project.yml").write_text(PROJECT)
    assert command(tmp_path, "provision", "project.yml", "--zip").returncode == 0
    for sent in (tmp_path / "kits").glob("*.zip"):
        sent.unlink()

    again = command(tmp_path, "provision", "project.yml", "--zip", "--json")
    result = json.loads(again.stdout)
    assert result["kits"] == {}
    assert set(result["unmade"]) == {"server", "north", "south", "ada@study.org"}
    assert "site north of north-hospital: has a certificate until" in again.stderr
    assert "--again north" in again.stderr
    assert list((tmp_path / "kits").glob("*.zip")) == []

    second = json.loads(command(tmp_path, "provision", "project.yml", "--again", "north", "--json").stdout)
    assert set(second["kits"]) == {"north"}
    kit, authority = read_kit(tmp_path / "kits/north"), Authority(tmp_path / "kits/authority")
    assert [item.serial for item in authority.counting("north")] == [kit.certificate.serial]
    assert [f"{serial:x}" for serial in authority.revoked()] == result["unmade"]["north"]

    refused = command(tmp_path, "provision", "project.yml", "--again", "north")
    assert refused.returncode == 1
    assert "there is a kit of north already" in refused.stderr
    assert read_kit(tmp_path / "kits/north").certificate == kit.certificate


def test_a_provisioning_that_was_killed_leaves_no_half_kit_and_no_silent_certificate(tmp_path: Path) -> None:
    (tmp_path / "project.yml").write_text(PROJECT)
    kill_in_write_kit = (
        "import os\n"
        "from fl_adapters.cli.app import app\n"
        "from fl_runtime.trust import kits\n"
        "write = kits.write_file\n"
        "def killed(path, *args, **options):\n"
        "    if path.parent.name == 'south' and path.name == 'policy.yml': os._exit(9)\n"
        "    write(path, *args, **options)\n"
        "kits.write_file = killed; app(['provision', 'project.yml'])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(script_kit.__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", kill_in_write_kit], cwd=tmp_path, env=environment, check=False)
    assert killed.returncode == 9
    result = json.loads(command(tmp_path, "provision", "project.yml", "--json").stdout)
    assert set(result["kits"]) == {"ada@study.org"}
    assert set(result["unmade"]) == {"south"}
    assert not (tmp_path / "kits/south").exists()
    result = json.loads(command(tmp_path, "provision", "project.yml", "--again", "south", "--json").stdout)
    assert read_kit(tmp_path / "kits/south").identity.name == "south"
    assert len(list(Authority(tmp_path / "kits/authority").counting("south"))) == 1


def test_passwords_are_shown_whole_on_a_narrow_terminal(tmp_path: Path) -> None:
    (tmp_path / "project.yml").write_text(PROJECT)
    done = CliRunner().invoke(
        app,
        ["provision", str(tmp_path / "project.yml"), "--out", str(tmp_path / "kits"), "--zip"],
        env={"COLUMNS": "20", "LINES": "5", "TERM": "xterm"},
    )
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    passwords = [line.removeprefix("    password: ") for line in lines if line.startswith("    password: ")]
    kits = [lines[number - 1].partition(": ")[2] for number, line in enumerate(lines) if line.startswith("    pass")]
    assert len(set(passwords)) == 4
    for number, (kit, password) in enumerate(zip(kits, passwords, strict=True)):
        read_archive(Path(kit), tmp_path / f"unpacked-{number}", password)
        assert read_kit(tmp_path / f"unpacked-{number}")


def test_a_kit_says_who_it_is_and_its_key_is_its_owners_alone(kits: Path) -> None:
    kit = read_kit(kits / "north", kind="site")
    assert kit.identity == Identity("study", "site", "north", "north-hospital")
    assert kit.address == "127.0.0.1:8443"
    assert 85 < kit.certificate.days_left() < 90.1
    for private in (kits / "north/key.pem", kits / "authority/ca.key"):
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
    pem = x509.load_pem_x509_certificate((kits / "ada/certificate.pem").read_bytes())
    names = pem.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    assert uri == "fl-adapters://study/admin/ada?organisation=north-hospital&role=project-admin"
    assert Identity.from_uri(uri).role == "project-admin"


def test_a_script_finds_its_place_in_a_kit(kits: Path) -> None:
    kit = script_kit.read_kit(kits / "south")
    assert (kit.site, kit.index, kit.count, kit.server) == ("south", 1, 2, "127.0.0.1:8443")
    assert kit.credentials == str((kits / "south").resolve())
    with pytest.raises(ConfigError, match="kit of a server"):
        script_kit.read_kit(kits / "server")


def spoil(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda kit: os.chmod(kit / "key.pem", 0o640), "can be read by others (mode 0640)"),
        (lambda kit: spoil(kit / "kit.json", b"8443", b"9443"), "kit.json was changed"),
        (lambda kit: spoil(kit / "manifest.json", b'"format"', b'"Format"'), "signature is not valid"),
        (lambda kit: (kit / "manifest.sig").write_bytes(b"nothing"), "signature is not valid"),
        (lambda kit: (kit / "manifest.json").unlink(), "there is no manifest"),
        (lambda kit: (kit / "certificate.pem").unlink(), "no certificate yet"),
        (lambda kit: (kit / "certificate.pem").write_bytes(b"-----BEGIN"), "not a certificate in PEM"),
        (
            lambda kit: (kit / "certificate.pem").write_bytes((kit.parent / "south/certificate.pem").read_bytes()),
            "is for site south",
        ),
        (lambda kit: (kit / "key.pem").write_bytes((kit.parent / "south/key.pem").read_bytes()), "does not belong to"),
        (lambda kit: (kit / "key.pem").write_bytes(b"no key"), "not a P-256 private key"),
        (lambda kit: (kit / "kit.json").unlink(), "there is no startup kit"),
    ],
)
def test_a_kit_that_was_changed_is_refused_with_what_is_wrong(kits: Path, harm: Any, says: str) -> None:
    harm(kits / "north")
    with pytest.raises(ConfigError) as caught:
        read_kit(kits / "north")
    assert says in caught.value.what
    assert str(kits / "north") in caught.value.where
    assert caught.value.fix


def test_a_kit_of_another_authority_is_refused(kits: Path, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", project())
    identity = other.project.participant("north")
    write_kit(tmp_path / "forged", other, identity)
    (kits / "north/certificate.pem").write_bytes((tmp_path / "forged/certificate.pem").read_bytes())
    with pytest.raises(ConfigError, match="not signed by this federation's authority"):
        read_kit(kits / "north")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("name: south", "name: north", "'north' is taken"),
        ("project-admin", "king", "admins.0.role"),
        ('"127.0.0.1:18443"', "nowhere", "'nowhere' is not an address"),
        ('"127.0.0.1:18443"', '"https://fl.example.org:8443"', "it has a scheme or a path"),
        ('"127.0.0.1:18443"', '"fl.example.org/fl:8443"', "it has a scheme or a path"),
        ('"127.0.0.1:18443"', '"fl.example.org :8443"', "it has a blank"),
        ('"127.0.0.1:18443"', '"2001:db8::1:8443"', "an IPv6 address stands in brackets"),
        ('"127.0.0.1:18443"', '"[2001:db8::x]:8443"', "an IPv6 address stands in brackets"),
        ('"127.0.0.1:18443"', '"fl,example:8443"', "its host is not a name"),
        ("name: north", "name: ../north", "name cannot be '../north'"),
        ("name: north", "name: authority", "'authority' is taken"),
        ("federation:", "federtion:", "federation: is missing; federtion: is not a field here"),
        ("name: north", "nam: north", "sites.0.name: is missing; sites.0.nam: is not a field here"),
        ('{address: "127.0.0.1:18443"}', "5", "server: should be fields, each with its value"),
        ("sites:", "sites: [", "is not valid YAML"),
    ],
)
def test_a_project_that_cannot_work_is_refused_with_its_field(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "project.yml"
    path.write_text(PROJECT.replace(old, new))
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")) as caught:
        read_project(path)
    assert caught.value.where == str(path)


def test_an_international_name_is_asked_for_in_ascii() -> None:
    with pytest.raises(ConfigError) as caught:
        split_address("b\u00fccher.example:8443")
    assert caught.value.fix == "write xn--bcher-kva.example:8443"
    assert split_address("xn--bcher-kva.example:8443") == ("xn--bcher-kva.example", 8443)
    assert split_address("[2001:db8::1]:8443") == ("2001:db8::1", 8443)


def test_a_list_of_wrong_entries_only_is_not_called_empty(tmp_path: Path) -> None:
    path = tmp_path / "project.yml"
    path.write_text(PROJECT.replace("organisation: north-hospital}", "}").replace("organisation: south-hospital}", "}"))
    with pytest.raises(ConfigError) as caught:
        read_project(path)
    assert "sites.0.organisation: is missing; sites.1.organisation: is missing" in caught.value.what
    assert "empty" not in caught.value.what


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "https://study/site/north?organisation=x",
        "fl-adapters://study/site/north",
        "fl-adapters://study/site/north?organisation=x&role=lead",
        "fl-adapters://study/admin/ada?organisation=x",
        "fl-adapters://study/site/..%2Fnorth?organisation=x",
        "fl-adapters://study/site/north?organisation=x&organisation=y",
        "fl-adapters://study/king/north?organisation=x",
        "fl-adapters://study/site/north/more?organisation=x",
        "fl-adapters://study/site/north%00?organisation=x",
    ],
)
def test_an_identity_that_says_something_else_is_none(uri: str) -> None:
    with pytest.raises(PermissionDeniedError):
        Identity.from_uri(uri)


# -- by mail -------------------------------------------------------------------------------------------------------

EARLIER_ZIP = """
UEsDBDMAAQBjAAAAIVwAAAAAKgAAAA4AAAANAAsAbm9ydGgva2V5LnBlbQGZBwACAEFFAwAATso/WUhIscquxjSxUn2ckxH4SEnQ
lrLhE6IYX5a3J3GQC/kYc6fdm7FEUEsDBDMAAQBjAAAAIVwAAAAALgAAABIAAAAOAAsAbm9ydGgva2l0Lmpzb24BmQcAAgBBRQMA
APQQUsIaE2JA0HVFpWMpT1yW3zFYqXPArjsgXooylq+wnOwgjVmHsrewPniJ5h1QSwECMwMzAAEAYwAAACFcAAAAACoAAAAOAAAA
DQALAAAAAAAAAAAAgIEAAAAAbm9ydGgva2V5LnBlbQGZBwACAEFFAwAAUEsBAjMDMwABAGMAAAAhXAAAAAAuAAAAEgAAAA4ACwAA
AAAAAAAAAKSBYAAAAG5vcnRoL2tpdC5qc29uAZkHAAIAQUUDAABQSwUGAAAAAAIAAgCNAAAAxQAAAAAA
"""


def test_a_zip_opens_with_its_password_and_keeps_the_mode_of_the_key(kits: Path, tmp_path: Path) -> None:
    password = new_password()
    write_archive(tmp_path / "north.zip", kits / "north", password)
    read_archive(tmp_path / "north.zip", tmp_path / "unpacked", password)
    assert read_kit(tmp_path / "unpacked").identity.name == "north"
    assert (kits / "north/key.pem").read_bytes() not in (tmp_path / "north.zip").read_bytes()


def test_other_programs_open_the_zip_and_ours_opens_theirs(kits: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "ours.zip", kits / "north", "pass word")
    with pyzipper.AESZipFile(tmp_path / "ours.zip") as archive:
        archive.setpassword(b"pass word")
        assert archive.read("north/key.pem") == (kits / "north/key.pem").read_bytes()
    with pyzipper.AESZipFile(tmp_path / "theirs.zip", "w", encryption=pyzipper.WZ_AES) as archive:
        archive.setpassword(b"pass word")
        for path in (kits / "north").iterdir():
            archive.writestr(path.name, path.read_bytes())
    read_archive(tmp_path / "theirs.zip", tmp_path / "unpacked", "pass word")
    assert read_kit(tmp_path / "unpacked").identity.name == "north"


def test_a_wrong_password_or_a_damaged_zip_is_refused(kits: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "north.zip", kits / "north", "right")
    for password, damage in (("wrong", False), ("right", True)):
        if damage:
            data = bytearray((tmp_path / "north.zip").read_bytes())
            data[200] ^= 1
            (tmp_path / "north.zip").write_bytes(data)
        with pytest.raises(ConfigError, match="cannot be opened"):
            read_archive(tmp_path / "north.zip", tmp_path / "unpacked", password)
        assert not (tmp_path / "unpacked").exists()


def test_a_zip_of_an_earlier_version_opens(tmp_path: Path) -> None:
    """The zip was written by fl-adapters before it used pyzipper."""
    (tmp_path / "north.zip").write_bytes(base64.b64decode(EARLIER_ZIP))
    read_archive(tmp_path / "north.zip", tmp_path / "north", "pass word")
    files = {
        path.name: (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) for path in (tmp_path / "north").iterdir()
    }
    assert files == {"kit.json": (b'{"site": "north"}\n', 0o644), "key.pem": (b"a private key\n", 0o600)}


@pytest.mark.parametrize("name", ["../..", "a\\b", "folder/", "a\0b"])
def test_a_zip_with_an_unusable_name_is_refused(tmp_path: Path, name: str) -> None:
    with pyzipper.AESZipFile(tmp_path / "x.zip", "w", encryption=pyzipper.WZ_AES) as archive:
        archive.setpassword(b"pass word")
        entry = archive.zipinfo_cls("placeholder")
        entry.filename = name
        archive.writestr(entry, b"" if name.endswith("/") else b"text")
    with pytest.raises(ConfigError, match="cannot be opened"):
        read_archive(tmp_path / "x.zip", tmp_path / "unpacked", "pass word")
    assert not (tmp_path / "unpacked").exists()


def test_folders_in_a_zip_are_ignored(tmp_path: Path) -> None:
    with pyzipper.AESZipFile(tmp_path / "x.zip", "w", encryption=pyzipper.WZ_AES) as archive:
        archive.setpassword(b"pass word")
        archive.writestr("../../outside", b"text")
    read_archive(tmp_path / "x.zip", tmp_path / "deep/unpacked", "pass word")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("outside")] == [Path("deep/unpacked/outside")]


def test_a_zip_that_is_not_encrypted_or_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    with pyzipper.AESZipFile(tmp_path / "plain.zip", "w") as archive:
        archive.writestr("kit.json", b"{}")
    with pyzipper.AESZipFile(
        tmp_path / "large.zip", "w", encryption=pyzipper.WZ_AES, compression=pyzipper.ZIP_DEFLATED
    ) as archive:
        archive.setpassword(b"pass word")
        archive.writestr("kit.json", bytes(2**25))
    assert (tmp_path / "large.zip").stat().st_size < 2**20
    for name in ("plain.zip", "large.zip"):
        with pytest.raises(ConfigError, match="cannot be opened"):
            read_archive(tmp_path / name, tmp_path / "unpacked", "pass word")
        assert not (tmp_path / "unpacked").exists()


def test_no_damaged_byte_of_a_zip_changes_what_is_unpacked(tmp_path: Path) -> None:
    good = base64.b64decode(EARLIER_ZIP)
    contents = [b"a private key\n", b'{"site": "north"}\n']
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1
        (tmp_path / "x.zip").write_bytes(damaged)
        folder = tmp_path / str(position)
        try:
            read_archive(tmp_path / "x.zip", folder, "pass word")
        except ConfigError:
            continue
        assert sorted(path.read_bytes() for path in folder.iterdir()) == contents, position


def test_a_missing_pyzipper_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyzipper", None)
    monkeypatch.delitem(sys.modules, "fl_runtime.trust.provisioning.archive")
    with pytest.raises(ConfigError, match="need the package pyzipper") as caught, needs_trust_extra():
        importlib.import_module("fl_runtime.trust.provisioning.archive")
    assert "fl-adapters[trust]" in caught.value.fix


def test_the_commands_zip_and_unpack(tmp_path: Path) -> None:
    (tmp_path / "project.yml").write_text(PROJECT)
    result = json.loads(command(tmp_path, "provision", "project.yml", "--zip", "--json").stdout)["kits"]["north"]
    assert not (tmp_path / "kits/north").exists()
    for read in (read_kit, script_kit.read_kit):
        for path in (tmp_path / "kits/north", tmp_path / "kits/north.zip"):
            with pytest.raises(ConfigError, match=f"first run `fl-adapters unpack {tmp_path}/kits/north.zip`"):
                read(path)
    password = tmp_path / "password"
    password.write_text(result["password"] + "\n")
    password.chmod(0o600)
    done = command(tmp_path, "unpack", result["kit"], "--password-file", str(password), "--json")
    assert done.returncode == 0, done.stderr
    assert read_kit(Path(tmp_path, json.loads(done.stdout)["kit"])).identity.name == "north"


def test_a_certificate_does_not_outlive_its_authority(tmp_path: Path) -> None:
    short = Project(**{**project().model_dump(), "authority_days": 10})
    with pytest.raises(ConfigError, match="would outlive the authority"):
        write_kit(tmp_path / "kit", Authority.create(tmp_path / "authority", short), short.participant("north"))


def test_how_long_to_wait_is_the_projects_in_every_kit_and_a_day_without(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority", project(patience_s=7200))
    for name in ("server", "north"):
        write_kit(tmp_path / name, authority, authority.project.participant(name))
    assert read_kit(tmp_path / "server").patience_s == 7200
    assert script_kit.read_kit(tmp_path / "north").patience_s == 7200
    assert project().patience_s == 86_400
    fields = json.loads((tmp_path / "north" / "kit.json").read_text())
    del fields["patience_s"]  # as in the kits of earlier versions
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kit.json").write_text(json.dumps(fields))
    assert script_kit.read_kit(tmp_path / "old").patience_s == 86_400
