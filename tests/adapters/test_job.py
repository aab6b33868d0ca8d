"""Jobs, kits and sites: settings are checked where they are written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest

from fl_adapters.job import EarlierModel, Job, site_names
from fl_adapters.participant.identity import Site, site
from fl_adapters.participant.kit import Kit, current_kit, read_kit
from fl_runtime.aggregation import FedAvg
from fl_runtime.aggregation.spec import Described
from fl_runtime.errors import ConfigError
from fl_runtime.types import RunSettings


def refused(**fields: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Job(**({"app": "train.py"} | fields))
    assert caught.value.what
    assert caught.value.where or caught.value.fix
    return caught.value


def test_a_job_has_the_fields_of_the_contract() -> None:
    assert set(Job.model_fields) == set(
        "name app rounds strategy sites min_sites deadline_s late every exchange keep_local optimizer_state filters "
        "initial best_metric best_mode patience min_delta seed exact_restart fraction site_weights cross_site "
        "rejoin_s durability trainings max_share patience_s join_s resources track secure_sum".split()
    )
    job = Job(app="train.py")
    assert (job.strategy, job.best_metric, job.best_mode, job.exact_restart) == ("fedavg", "loss", "min", False)


def test_a_name_is_made_from_the_app_and_the_time() -> None:
    assert Job(app="some dir/my train!.py").name.startswith("my-train-")
    assert Job(app="package.train").name.startswith("train-")
    assert Job(app="...").name.startswith("job-")
    assert Job(app="train.py", name="mine").name == "mine"


def test_a_job_survives_yaml_and_pickle(tmp_path: Path) -> None:
    job = Job(
        app="train.py",
        name="full",
        rounds=7,
        sites=["a", "b"],
        min_sites=1,
        deadline_s=60,
        late="carry",
        every="2 epochs",
        exchange=["encoder.*"],
        keep_local=["head.*"],
        optimizer_state="average",
        initial="start.safetensors",
        best_metric="accuracy",
        best_mode="max",
        patience=3,
        min_delta=0.01,
        seed=3,
        fraction=0.5,
        site_weights={"a": 2.0},
    )
    file = tmp_path / "job.yml"
    file.write_text(job.to_yaml())
    assert Job.from_file(file) == job
    assert pickle.loads(pickle.dumps(job)) == job
    minimal = Job(app="train.py", name="small")
    assert minimal.to_yaml() == "name: small\napp: train.py\n"


def test_the_settings_of_a_run_say_what_the_job_says() -> None:
    settings = Job(app="train.py", name="x", rounds=2, every=50, keep_local=["a.*"]).settings(["n", "s"])
    assert (settings.name, settings.sites, settings.min_sites, settings.rounds) == ("x", ("n", "s"), 2, 2)
    assert (settings.every, settings.keep_local, settings.deadline_s) == (50, ("a.*",), 86_400.0)
    assert Job(app="train.py", min_sites=1).settings(["n", "s"]).min_sites == 1
    assert Job(app="train.py", fraction=0.3).settings(site_names(10)).min_sites == 3
    assert Job(app="train.py", fraction=0.31).settings(site_names(10)).min_sites == 4


def test_job_and_run_settings_have_the_same_fields() -> None:
    """Both list every setting; names, types and defaults must not drift apart. The differences are these."""
    job, run = get_type_hints(Job), get_type_hints(RunSettings)
    names = {field.name for field in fields(RunSettings)}
    assert names - set(Job.model_fields) == {"submitted_by", "initial_job"}
    assert set(Job.model_fields) - names == {"track"}  # who runs the server or a site decides there
    other_types = {
        "strategy": (str | Described, str | None),  # an object becomes text; None leaves the choice to the script
        "sites": (int | tuple[str, ...] | None, tuple[str, ...]),
        "initial": (str | EarlierModel | None, str | None),  # an earlier job's is in initial_job
        "min_sites": (int | None, int),
        "filters": (tuple[dict[str, Any], ...], tuple[Mapping[str, Any], ...]),
        "site_weights": (dict[str, float], Mapping[str, float]),
        "resources": (dict[str, float], Mapping[str, float]),
        "best_metric": (str, str | None),
        "best_mode": (Literal["min", "max"], Literal["min", "max"] | None),
        "optimizer_state": (Literal["keep", "reset", "average"] | None, str | None),
    }
    for name in set(Job.model_fields) - {"track"}:
        assert (job[name], run[name]) == other_types.get(name, (job[name], job[name])), name
    settings, plain = Job(app="train.py", name="x").settings(["n"]), RunSettings("x", ("n",), 1, app="train.py")
    assert settings == plain, "a job without further fields has the defaults of RunSettings"


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"rounds": "3"}, "rounds cannot be '3'"),
        ({"rounds": 0}, "rounds cannot be 0"),
        ({"rounds": True}, "rounds cannot be True"),
        ({"late": "never"}, "'drop' or 'carry'"),
        ({"best_mode": "most"}, "'min' or 'max'"),
        ({"deadline_s": 0}, "deadline_s cannot be 0"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"every": "weekly"}, "weekly"),
        ({"exchange": "some"}, "some"),
        ({"optimizer_state": "drop"}, "optimizer_state"),
        ({"keep_local": "head"}, "keep_local"),
        ({"sites": "abc"}, "sites cannot be 'abc'"),
        ({"sites": 0}, "0 sites"),
        ({"sites": []}, "sites"),
        ({"sites": ["a", "a"]}, "'a' is listed twice"),
        ({"sites": ["../a"]}, "'../a'"),
        ({"sites": ["global"]}, "'global'"),
        ({"fraction": 0.0}, "fraction cannot be 0.0"),
        ({"fraction": 1.1}, "fraction cannot be 1.1"),
        ({"fraction": 0.5, "sites": 4, "min_sites": 3}, "has 4 sites, of which 2 take part"),
        ({"fraction": 0.5, "sites": 8, "strategy": "krum:f=1"}, "needs at least 2 f + 3 = 5"),
        ({"fraction": 0.5, "strategy": "tree-bagging"}, "needs all sites in every round"),
        ({"sites": 2, "site_weights": {"north": 2.0}}, "'north' has a weight but is not a site"),
        ({"site_weights": {"site-1": 0.0}}, "the weight of site-1 is 0.0"),
        ({"site_weights": {"site-1": 2.0}, "strategy": "median"}, "does not support site_weights"),
        ({"fraction": 0.5, "strategy": "fedbuff"}, "fraction needs rounds"),
        ({"patience": 2, "strategy": "fedbuff:k=3"}, "patience needs rounds"),
        ({"patience": 0}, "patience cannot be 0"),
        ({"min_delta": -1}, "min_delta cannot be -1"),
        ({"sites": 2, "min_sites": 3}, "min_sites is 3, but the job has 2 sites"),
        ({"name": "a/b"}, "'a/b'"),
        ({"name": ""}, "''"),
        ({"app": ""}, "app"),
        ({"filters": [{"name": "Noise"}]}, "there is no filter 'Noise'"),
        ({"exact_restart": True, "strategy": "fedbuff:k=2"}, "exact_restart needs rounds"),
        ({"exact_restart": True, "filters": [{"name": "SVTPrivacy"}]}, "SVTPrivacy uses the operating system"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], wanted: str) -> None:
    assert wanted in str(refused(**fields))


def test_an_unknown_strategy_lists_the_known() -> None:
    error = refused(strategy="fedmagic")
    assert "fedmagic" in error.what
    assert "fedavg" in error.fix
    assert error.where == "strategy"


def test_a_strategy_may_be_an_object(tmp_path: Path) -> None:
    job = Job(app="train.py", name="x", strategy=FedAvg(weights="equal"))
    assert job.strategy == "fedavg:weights=equal"
    assert job == Job(app="train.py", name="x", strategy="fedavg:weights=equal")
    assert job.settings(["a"]).strategy == "fedavg:weights=equal"
    file = tmp_path / "job.yml"
    file.write_text(job.to_yaml())
    assert Job.from_file(file) == job
    assert "strategy" in refused(strategy=3).what


def test_an_unknown_field_lists_the_known_and_every_error_is_reported_at_once() -> None:
    error = refused(round=3, seed=-1)
    assert "round is not a field of a job" in error.what
    assert "seed cannot be -1" in error.what
    assert "rounds" in error.fix
    with pytest.raises(ConfigError, match="app is missing"):
        Job(rounds=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("app: train.py\nrounds: many\n", "rounds cannot be 'many'"),
        ("app: [unclosed\n", "not valid YAML"),
        ("- app\n", "not a table"),
        ("", "not a table"),
        ("app: train.py\nwhatever: 1\n", "whatever is not a field"),
    ],
)
def test_a_bad_job_file_is_named_with_the_field(tmp_path: Path, text: str, wanted: str) -> None:
    file = tmp_path / "job.yml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Job.from_file(file)
    assert wanted in caught.value.what
    assert str(file) in caught.value.where


def test_what_is_given_counts_in_place_of_a_job_files_fields(tmp_path: Path) -> None:
    file = tmp_path / "job.yml"
    file.write_text("rounds: 3\nseed: 7\n")
    job = Job.from_file(file, app="train.py", rounds=5)
    assert (job.app, job.rounds, job.seed) == ("train.py", 5, 7)
    with pytest.raises(ConfigError) as caught:
        Job.from_file(file, app="train.py", rounds=0)
    assert caught.value.where == "rounds", "the file is not at fault"


def test_a_job_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Job.from_file(tmp_path / "none.yml")


def test_site_names() -> None:
    assert site_names(3) == ("site-1", "site-2", "site-3")
    assert site_names(["north", "south"]) == ("north", "south")


# -- kits and sites -------------------------------------------------------------------------------------------------

KIT = Kit(job="j", site="north", index=1, count=3, server="127.0.0.1:5", token="secret", run="/r", simulated=True)


def test_a_kit_is_read_back_and_keeps_its_secret(tmp_path: Path) -> None:
    folder = KIT.save(tmp_path / "kit")
    assert read_kit(folder) == KIT
    assert (folder / "kit.json").stat().st_mode & 0o077 == 0
    assert "secret" not in repr(KIT)


def test_a_site_knows_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    assert site() == Site(name="local", index=0, count=1, job="")
    assert current_kit() is None
    folder = str(KIT.save(tmp_path))
    assert site(kit=folder).name == "north"
    monkeypatch.setenv("FL_ADAPTERS_KIT", folder)
    assert site() == Site(name="north", index=1, count=3, job="j")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"format": 2}, "format 2"),
        ({"token": None}, "'token' cannot be None"),
        ({"index": True}, "'index' cannot be True"),
        ({"index": 3}, "index 3 is not below count 3"),
    ],
)
def test_a_kit_that_cannot_work_is_named(tmp_path: Path, change: dict[str, Any], wanted: str) -> None:
    file = KIT.save(tmp_path) / "kit.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError) as caught:
        read_kit(tmp_path)
    assert wanted in caught.value.what
    assert caught.value.where == str(file)
    assert caught.value.fix


def test_a_kit_from_a_later_minor_version_may_say_more(tmp_path: Path) -> None:
    file = KIT.save(tmp_path) / "kit.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"region": "eu"}))
    assert read_kit(tmp_path) == KIT


@pytest.mark.parametrize("text", ["[]", "{", '{"format": 1, "job": "j"}'])
def test_a_file_that_is_no_kit(tmp_path: Path, text: str) -> None:
    (tmp_path / "kit.json").write_text(text)
    with pytest.raises(ConfigError, match=r"kit"):
        read_kit(tmp_path)
    with pytest.raises(ConfigError, match="no startup kit"):
        read_kit(tmp_path / "elsewhere")
