"""The folders that a simulation's sites write to, and paths that they must not share."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fl_adapters.participant.kit import Kit
from fl_adapters.participant.outputs import claimed_path, placed
from fl_runtime.errors import ConfigError


def test_relative_paths_move_below_the_sites_own_folder(tmp_path: Path) -> None:
    for path in ("out", "out/logs", "./out", "."):
        found = {site: claimed_path(tmp_path, site, path) for site in ("site-1", "site-2")}
        assert len(set(found.values())) == 2
        for site, moved in found.items():
            assert Path(moved).resolve().is_relative_to(tmp_path / "sites" / site)


def test_paths_that_were_moved_already_stay(tmp_path: Path) -> None:
    moved = claimed_path(tmp_path, "site-1", "out")
    assert claimed_path(tmp_path, "site-1", moved) == moved


def test_an_absolute_path_belongs_to_the_first_site_that_claims_it(tmp_path: Path) -> None:
    shared = str(tmp_path / "elsewhere" / "out")
    run = tmp_path / "run"
    assert claimed_path(run, "site-1", shared) == shared
    assert claimed_path(run, "site-1", shared) == shared  # a restart of the same site
    with pytest.raises(ConfigError, match="site-1 and site-2 would both write") as caught:
        claimed_path(run, "site-2", shared)
    assert shared in caught.value.what
    assert "relative path" in caught.value.fix
    assert claimed_path(run, "site-2", shared + "-2") == shared + "-2"


def test_two_names_of_one_folder_are_one_folder(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    claimed_path(tmp_path / "run", "site-1", str(real))
    with pytest.raises(ConfigError):
        claimed_path(tmp_path / "run", "site-2", str(tmp_path / "link"))


def test_a_relative_path_that_leads_out_of_the_folder_is_claimed_like_an_absolute_one(tmp_path: Path) -> None:
    claimed_path(tmp_path / "run", "site-1", "../../shared-out")
    with pytest.raises(ConfigError, match="would both write"):
        claimed_path(tmp_path / "run", "site-2", "../../shared-out")


def test_of_many_sites_at_once_one_gets_the_path(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def claim(number: int) -> str:
        barrier.wait()
        try:
            return claimed_path(tmp_path / "run", f"site-{number}", "/nowhere/out")
        except ConfigError as error:
            return error.what

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(claim, range(8)))
    assert found.count("/nowhere/out") == 1
    assert all(text.startswith("site-") for text in found if text != "/nowhere/out")


def test_folders_below_the_working_directory_move_however_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "job"
    kit = Kit("job", "site-1", 0, 2, "nowhere", "secret", run=str(run), simulated=True)
    own = run / "sites" / "site-1"
    for folder in ("out/logs", "./out/logs", str(tmp_path / "out" / "logs"), "out/../out/logs"):
        moved = placed(kit, folder)
        assert Path(moved) == own / "out" / "logs"
        assert placed(kit, moved) == moved
    assert placed(kit, "s3://bucket/out") == "s3://bucket/out"
    elsewhere = str(tmp_path.parent / "elsewhere")
    assert placed(kit, elsewhere) == elsewhere
    assert placed(None, "out") == "out"
    production = Kit("job", "site-1", 0, 2, "nowhere", "secret")
    assert placed(production, "out") == "out"


def test_a_moved_folder_exists_if_that_of_the_script_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kit = Kit("job", "site-1", 0, 2, "nowhere", "secret", run=str(tmp_path / "runs" / "job"), simulated=True)
    (tmp_path / "there").mkdir()
    assert Path(placed(kit, "there")).is_dir()
    assert not Path(placed(kit, "absent")).exists()
