"""Kits, policies and authorities that other users of the machine could change are refused."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

import pytest
from study import project

from fl_adapters.participant import kit as script_kit
from fl_runtime.errors import ConfigError
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.files import check_private, check_unwritable
from fl_runtime.trust.kits import read_kit, write_kit
from fl_runtime.trust.policy import PolicyFile, read_policy

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    authority = Authority.create(tmp_path / "deep/kits/authority", project())
    for name in ("north", "server", "ada"):
        write_kit(tmp_path / "deep/kits" / name, authority, authority.project.participant(name))
    return tmp_path / "deep/kits"


@pytest.mark.parametrize("kit", ["north", "server", "ada"])
@pytest.mark.parametrize("file", ["kit.json", "ca.pem", "certificate.pem", "policy.yml", ".", "..", "../.."])
@pytest.mark.parametrize("bit", [stat.S_IWOTH, stat.S_IWGRP])
def test_a_kit_that_others_can_write_is_refused_with_the_command(kits: Path, kit: str, file: str, bit: int) -> None:
    path = Path(os.path.abspath(kits / kit / file))
    if not path.exists():
        pytest.skip("only sites have a policy")
    group = 12_345 if os.geteuid() == 0 else os.getegid()
    os.chown(path, -1, group)
    if bit == stat.S_IWGRP and os.geteuid() != 0:
        pytest.skip("the group of this user may be private")
    before = stat.S_IMODE(path.stat().st_mode)
    path.chmod(before | bit)
    for read in (read_kit, *([script_kit.read_kit] if kit == "north" else [])):
        with pytest.raises(ConfigError, match="can change") as caught:
            read(kits / kit)
        assert f"mode {before | bit:04o}" in caught.value.what
        assert f"chmod go-w {path};" in caught.value.fix
    os.system(caught.value.fix.partition(";")[0])
    assert read_kit(kits / kit)


def test_a_sticky_folder_above_a_kit_is_fine_and_a_link_is_followed(kits: Path) -> None:
    kits.chmod(0o1777)
    assert read_kit(kits / "north")
    link = kits.parent / "link"
    link.symlink_to(kits / "north")
    assert read_kit(link)
    (kits / "north/policy.yml").chmod(0o666)
    with pytest.raises(ConfigError, match="group and others can change|others can change"):
        read_policy(link / "policy.yml")


def test_a_policy_that_becomes_writable_while_the_site_runs_is_refused(kits: Path) -> None:
    policy = PolicyFile(kits / "north/policy.yml")
    assert policy.refresh() is False
    (kits / "north/policy.yml").chmod(0o646)
    with pytest.raises(ConfigError, match="others can change .*policy.yml"):
        policy.refresh()
    (kits / "north/policy.yml").chmod(0o644)
    assert policy.refresh() is False


@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(kits: Path) -> None:
    os.chown(kits / "north/policy.yml", 12_345, -1)
    with pytest.raises(ConfigError, match="belongs to another user .number 12345.") as caught:
        read_kit(kits / "north")
    assert f"chown 0 {kits}/north/policy.yml" in caught.value.fix


@pytest.mark.parametrize("file", ["ca.pem", "project.yml", "crl.pem", "."])
def test_an_authority_that_others_can_write_is_refused(kits: Path, file: str) -> None:
    path = kits / "authority" / file
    path.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IWOTH)
    with pytest.raises(ConfigError, match="others can change"):
        Authority(kits / "authority")


def test_a_missing_file_is_left_to_its_reader(tmp_path: Path) -> None:
    check_unwritable(tmp_path / "nothing/here")


def test_a_service_may_read_a_key_of_roots_by_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a file of root's")
    key = tmp_path / "key.pem"
    key.touch()
    key.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others"):
        check_private(key)
    monkeypatch.setattr(os, "geteuid", lambda: 10_001)
    check_private(key)
    for mode in (0o644, 0o660):
        key.chmod(mode)
        with pytest.raises(ConfigError, match="can be read by others"):
            check_private(key)
    os.chown(key, 10_001, -1)
    key.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others"):
        check_private(key)


def test_the_volume_of_a_pod_whose_group_is_its_users_own_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another group")
    os.chown(tmp_path, 0, 10_001)
    tmp_path.chmod(0o2775)
    with pytest.raises(ConfigError, match="group and others|group can change"):
        check_unwritable(tmp_path / "data")
    user = pwd.struct_passwd(("service", "x", 10_001, 10_001, "", "/", "/bin/false"))
    root = pwd.getpwuid(0)
    monkeypatch.setattr(os, "geteuid", lambda: 10_001)
    monkeypatch.setattr(pwd, "getpwuid", {0: root, 10_001: user}.__getitem__)
    for members in ([], ["service"]):
        monkeypatch.setattr(grp, "getgrgid", lambda _, m=members: grp.struct_group(("service", "x", 10_001, m)))
        check_unwritable(tmp_path / "data")
    monkeypatch.setattr(grp, "getgrgid", lambda _: grp.struct_group(("service", "x", 10_001, ["mallory"])))
    with pytest.raises(ConfigError, match="group can change"):
        check_unwritable(tmp_path / "data")
