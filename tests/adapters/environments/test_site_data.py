"""Where the data of each site lie: what is typed, which sites follow from it, and what is refused before a start."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_adapters import ConfigError, Job, ProofOfConcept, Simulation
from fl_adapters.environments.starting.site_data import DataOfSites, names_of, parse_data, places_of


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of the sites `site-1`, `site-2` and `site-10`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "parts [all]"  # brackets mean something to glob
    folder.mkdir()
    for name in ("site-10", "site-1", "site-2"):
        (folder / f"{name}.csv").write_text(f"{name}\n")
    (folder / "notes.txt").touch()
    return folder


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ((), None),
        (("north=a.csv,south=b.csv",), {"north": "a.csv", "south": "b.csv"}),
        (("north=a.csv", "south=s3://b/x?y=1"), {"north": "a.csv", "south": "s3://b/x?y=1"}),
        (("parts/{site}.csv",), "parts/{site}.csv"),
    ],
)
def test_what_is_typed_is_a_pattern_or_a_path_for_each_site(words: tuple[str, ...], found: DataOfSites | None) -> None:
    assert parse_data(words) == found


@pytest.mark.parametrize("words", [("all.csv",), ("parts/a.csv", "parts/b.csv"), ("north=",), ("=a",), ("north=a,",)])
def test_a_value_that_names_no_site_says_how_to_write_it(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="does not say whose data") as caught:
        parse_data(words)
    assert "north=a.csv,south=b.csv" in caught.value.fix


def test_a_site_is_named_once() -> None:
    with pytest.raises(ConfigError, match="names the site 'north' twice"):
        parse_data(("north=a.csv,north=b.csv",))


def test_the_sites_of_a_pattern_are_those_of_its_files_in_order(parts: Path) -> None:
    pattern = "parts [all]/{site}.csv"
    assert names_of(pattern) == ("site-1", "site-2", "site-10")
    assert places_of(pattern, ["site-2"]) == {"site-2": str(parts / "site-2.csv")}
    (parts / "north" / "x").mkdir(parents=True)
    (parts / "north" / "train-north.csv").touch()
    assert names_of(Path(parts, "{site}", "train-{site}.csv")) == ("north",)


def test_a_pattern_without_files_and_a_path_for_all_are_refused(parts: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file matches none/\{site\}.csv"):
        names_of("none/{site}.csv")
    with pytest.raises(ConfigError, match="every site would read"):
        names_of(parts / "site-1.csv")
    (parts / "my file.csv").touch()
    with pytest.raises(ConfigError, match="'my file' cannot name a folder"):
        names_of("parts [all]/{site}.csv")


def test_addresses_are_passed_on_as_they_are() -> None:
    assert names_of("s3://bucket/{site}") is None
    assert places_of("s3://bucket/{site}", ["north"]) == {"north": "s3://bucket/north"}


def test_data_and_sites_must_have_the_same_names(parts: Path) -> None:
    data = {"north": parts / "site-1.csv", "south": parts / "site-2.csv"}
    with pytest.raises(ConfigError, match="the site 'nroth' has no data") as caught:
        places_of(data, ["nroth", "south"])
    assert "did you mean north?" in caught.value.fix
    with pytest.raises(ConfigError, match="data are given for 'south', which is not a site"):
        places_of(data, ["north"])


def test_an_empty_table_is_a_mistake() -> None:
    for sites in (None, ["north"]):
        with pytest.raises(ConfigError, match="data are given for no site"):
            Job(app=__file__).run(Simulation(sites=sites, data={}))


@pytest.mark.parametrize("environment", [Simulation, ProofOfConcept])
def test_data_that_are_not_there_are_refused_before_anything_starts(
    environment: type[Simulation] | type[ProofOfConcept], parts: Path
) -> None:
    Path("train.py").write_text("raise SystemExit('must not run')")
    data = {"north": parts / "site-1.csv", "south": parts / "south.csv"}
    with pytest.raises(ConfigError, match=r"there are no data at .*south\.csv") as caught:
        Job(app="train.py").run(environment(data=data))
    assert "south" in caught.value.where
    assert not Path("runs").exists()
