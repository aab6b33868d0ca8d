"""Kits that cannot be written: what changes is kept in a folder of the participant's own, and never goes back."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from read_only import bound_by_modes, contents, make_read_only, make_writable
from study import project
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_adapters.participant.kit import read_kit as read_script_kit
from fl_runtime.errors import ConfigError, StoreError
from fl_runtime.trust import audit
from fl_runtime.trust.authority import Authority, signed_members
from fl_runtime.trust.certificates import key_pem, new_key
from fl_runtime.trust.files import STATE_VARIABLE
from fl_runtime.trust.kits import known_roots, read_kit, take_up_roots, write_kit
from fl_runtime.trust.project import MEMBERS, Members, read_members
from fl_runtime.trust.revocation import RevocationList
from fl_runtime.trust.roots import rotation
from fl_runtime.trust.roots.statements import offered
from fl_runtime.trust.working_kit import WORKING_KIT, working_kit

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


class Place:
    """An authority, kits that cannot be written, and a folder for the state of one of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        self.authority = Authority.create(folder / "authority", project())

    def kit(self, name: str) -> Path:
        """Provision a kit, in place of an earlier one, as a new secret would be."""
        kit = self.folder / "kits" / name
        if kit.exists():
            make_writable(kit)
            shutil.rmtree(kit)
        write_kit(kit, self.authority, self.authority.project.participant(name))
        make_read_only(kit)
        return kit

    def put(self, kit: Path, file: str, data: bytes) -> None:
        """Put a file into a kit, as its owner would."""
        make_writable(kit)
        (kit / file).write_bytes(data)
        make_read_only(kit)

    def working(self, kit: Path) -> Path:
        """The folder in which a kit is used by a process that is bound by modes."""
        with bound_by_modes():
            return working_kit(kit, self.state)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(STATE_VARIABLE, raising=False)
    return Place(tmp_path)


def test_a_kit_that_can_be_written_is_used_as_it_is(place: Place) -> None:
    kit = place.kit("north")
    make_writable(kit)
    assert place.working(kit) == kit
    assert read_kit(kit).folder == kit.resolve()
    assert not place.state.exists()


@pytest.mark.parametrize("name", ["server", "north", "ada"])
def test_what_is_written_goes_to_the_state_and_what_the_owner_edits_comes_from_the_kit(place: Place, name: str) -> None:
    kit = place.kit(name)
    before = contents(kit)
    with bound_by_modes():
        working = working_kit(kit, place.state)
        assert working == place.state / WORKING_KIT
        found = read_kit(working)
        assert (found.folder, found.identity.name) == (working.resolve(), name)
        audit.AuditLog(found.folder, found.folder).write("started", found.identity)
        RevocationList(found.folder / "crl.pem", place.authority.roots).install(place.authority.crl)
        assert working_kit(working) == working, "a working kit has none of its own"
    assert contents(kit) == before
    assert audit.verify(working, audit.Anchor(kit=working)) == (1, [])
    if name == "north":
        place.put(kit, "policy.yml", b"approve: ask\n")
        assert read_kit(working).policy_file.read_bytes() == b"approve: ask\n"
    make_writable(kit)
    assert place.working(kit) == working, "the audit log is there"


def test_without_a_named_folder_the_state_is_the_users_own(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    north, ada, server = place.kit("north"), place.kit("ada"), place.kit("server")
    home = (place.folder / "home" / "fl-adapters" / "study").resolve()
    server.parent.chmod(0o555)
    with bound_by_modes():
        assert read_kit(north).folder == home / "site-north" / WORKING_KIT
        assert read_kit(ada).folder == home / "admin-ada" / WORKING_KIT
        script = read_script_kit(north)
        assert script.credentials == str(home / "site-north" / WORKING_KIT)
        assert script.folder == script.credentials, "a script writes nothing beside the kit"
        with pytest.raises(StoreError, match="cannot be kept in .*/kits/server-data: Permission denied") as caught:
            read_kit(server)
        assert STATE_VARIABLE in caught.value.fix
        monkeypatch.setenv(STATE_VARIABLE, str(place.state))
        assert read_kit(server).folder == (place.state / WORKING_KIT).resolve()
        with pytest.raises(ConfigError, match="keeps the state of server server of .*; the kit is that of site north"):
            read_kit(north)
    server.parent.chmod(0o755)


def test_a_state_folder_that_others_can_write_is_refused(place: Place) -> None:
    kit = place.kit("north")
    place.state.mkdir()
    place.state.chmod(0o777)
    with pytest.raises(ConfigError, match="others can change what is in"):
        place.working(kit)
    place.state.chmod(0o700)
    working = place.working(kit)
    (working / "crl.number").chmod(0o666)
    working.chmod(0o707)
    with pytest.raises(ConfigError, match="others can change"):
        read_kit(working)


def crl_in(folder: Path, authority: Authority) -> int:
    current = RevocationList(folder / "crl.pem", authority.roots).current
    assert current is not None
    return current.number


def members_in(folder: Path, authority: Authority) -> int:
    current = Members(folder, "study", lambda: authority.roots, ()).current
    assert current is not None
    return current.number


def renewed_crl(authority: Authority) -> bytes:
    authority.sign_list()
    return authority.crl


def renewed_members(authority: Authority) -> bytes:
    """A list of members with a number above the one before."""
    newer = replace(read_members(signed_members(authority), "study", "", None), number=time.time_ns())
    return newer.signed(authority.newest_root.key, "study")


def put_crl(folder: Path, authority: Authority, data: bytes) -> None:
    RevocationList(folder / "crl.pem", authority.roots).install(data)


def put_members(folder: Path, authority: Authority, data: bytes) -> None:
    Members(folder, "study", lambda: authority.roots, ()).install(data)


_LISTS: Any = pytest.mark.parametrize(
    ("file", "number_in", "renewed", "put"),
    [("crl.pem", crl_in, renewed_crl, put_crl), (MEMBERS, members_in, renewed_members, put_members)],
    ids=["crl", "members"],
)


@_LISTS
def test_the_newest_list_counts_wherever_it_lies_and_an_older_one_never(
    place: Place,
    file: str,
    number_in: Callable[[Path, Authority], int],
    renewed: Callable[[Authority], bytes],
    put: Callable[[Path, Authority, bytes], None],
) -> None:
    kit, authority = place.kit("server"), place.authority
    oldest = (kit / file).read_bytes()
    lists = [renewed(authority) for _ in range(3)]
    working = place.working(kit)
    numbers = [number_in(working, authority)]
    for data in lists[:2]:  # as the server or an admin sends them
        put(working, authority, data)
        numbers.append(number_in(place.working(kit), authority))
    place.put(kit, file, lists[0])
    assert number_in(place.working(kit), authority) == numbers[2], "what has come is newer"
    place.put(kit, file, lists[2])
    numbers.append(number_in(place.working(kit), authority))
    assert numbers == sorted(set(numbers)), "the kit's is newer"
    place.put(kit, file, oldest)
    with pytest.raises(ConfigError, match=rf"older than the one in force \(number {numbers[3]}\)"):
        number_in(place.working(kit), authority)
    (working / file).unlink()
    with pytest.raises(ConfigError, match="older than the one in force"):
        number_in(place.working(kit), authority)


def test_a_renewed_certificate_counts_until_the_kit_has_a_newer_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(place.state))
    kit, identity = place.kit("north"), place.authority.project.participant("north")
    before = contents(kit)
    own_key, same_key, new = place.folder / "own.pem", place.folder / "same.pem", new_key()
    own_key.write_bytes(key_pem(new))

    def install(pem: bytes, *more: str | Path) -> bytes:
        same_key.write_bytes(pem)
        with bound_by_modes():
            done = CliRunner().invoke(app, ["cert", "install", str(same_key), "--kit", str(kit), *map(str, more)])
            assert done.exit_code == 0, done.output
            return read_kit(kit).certificate.pem

    renewed = place.authority.renew("north")
    assert install(renewed) == renewed
    working = place.working(kit)
    assert (working / "key.pem").is_symlink(), "the key of the kit is not copied"
    rekeyed = place.authority.issue(identity, new.public_key())
    assert install(rekeyed, "--key", own_key) == rekeyed
    assert stat.S_IMODE((working / "key.pem").lstat().st_mode) == 0o600
    assert contents(kit) == before
    assert place.working(kit) == working
    assert read_kit(working).certificate.pem == rekeyed, "also after a restart"
    kit = place.kit("north")  # provisioned again, with a key and a certificate of its own
    place.working(kit)
    assert read_kit(working).certificate.pem == (kit / "certificate.pem").read_bytes()


def test_new_roots_are_taken_up_and_stay_when_an_older_kit_is_put_back(place: Place) -> None:
    kit, folder = place.kit("north"), place.authority.folder
    working = place.working(kit)
    rotation.begin(place.authority)
    package = rotation.read_package(folder / "roots.json")
    with bound_by_modes():
        assert take_up_roots(working, offered(package, "north", 0)) == 1
    roots = known_roots(working).roots
    assert roots != (kit / "ca.pem").read_bytes()
    assert read_kit(place.working(kit)).certificate.pem != (kit / "certificate.pem").read_bytes()
    place.put(kit, "kit.json", (kit / "kit.json").read_bytes() + b"\n")
    with pytest.raises(ConfigError, match="kit.json was changed"):
        read_kit(place.working(kit))
    place.authority = Authority(folder)
    fresh = place.kit("north")
    assert known_roots(place.working(fresh)).number == 1
    assert read_kit(working).certificate.pem == (fresh / "certificate.pem").read_bytes()
