"""Unmodified bundles become participants, in every dialect; and the same set up by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import monai_bundles
import monai_models as m
import pytest
import torch
from monai.bundle import ConfigWorkflow

from fl_adapters.monai import FederatedHandler
from fl_adapters.monai.__main__ import run as run_bundle
from fl_runtime.errors import ConfigError, QuorumError

TARGET = "fl_adapters.monai.FederatedHandler"


@pytest.fixture
def site(federation, monkeypatch) -> Any:
    """site(**settings) starts a run whose only site is this process."""

    def begin(**settings: Any) -> Any:
        run = federation(**settings)
        monkeypatch.setenv("FL_ADAPTERS_KIT", run.places[0].kit)
        return run

    return begin


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `fl-adapters ...` in its own process."""
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-m", "fl_adapters", *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def updates(run: Any, field: str) -> list[Any]:
    return [e.data[field] for e in run.events if e.kind == "update"]


@pytest.mark.parametrize("file", ["configs/train.json", "configs/train.yaml", "train.yml", "configs/training.json"])
@pytest.mark.parametrize(
    "dialect",
    [
        {},
        {"trainer": "trainer", "epochs": "num_epochs"},
        {"run": "training"},
        {"run": ["training", "$monai.utils.set_determinism(seed=1)", "$@network.train()"], "trainer": "trainer"},
        {"run": ["run", "$import os", "$[@train#trainer]"], "epochs": "num_epochs"},
        {"trainer": "train#the_trainer"},
    ],
    ids=lambda dialect: "-".join(map(str, dialect)) or "usual",
)
def test_bundles_of_all_dialects(site, tmp_path, file, dialect) -> None:
    run = site(rounds=3)
    folder = monai_bundles.write(tmp_path / "bundle", monai_bundles.config(**dialect), file)
    run_bundle(folder)
    assert len(run.result().rounds) == 3
    assert updates(run, "local_steps") == [3] * 3 and updates(run, "num_examples") == [6] * 3
    scores = [e.data["metrics"] for e in run.events if e.kind == "report"]
    assert [set(score) for score in scores] == [{"mean_dice", "mean_dice_1", "mean_dice_2"}] * 3
    own = run.folder / "sites" / "site-1"
    assert (own / "models" / "model.pt").is_file() and list((own / "eval").glob("events.*"))
    left = {path.name for path in (tmp_path / "bundle").rglob("*") if path.is_file()}
    assert left == {Path(file).name, "metadata.json"}  # nothing was written into the bundle


def test_federation_of_one_site_trains_as_the_bundle_alone(site, tmp_path, monkeypatch) -> None:
    """The trainer is created at its usual moment, with the same random state and the same schedule."""
    early = ["run", "$monai.utils.set_determinism(seed=7)"]
    folder = monai_bundles.write(tmp_path / "bundle", monai_bundles.config(run=early, initialize=[]))
    weights = []
    for rounds in (None, 3):
        run = site(rounds=rounds) if rounds else None
        torch.manual_seed(len(weights))
        kept: dict[str, Any] = {}
        monkeypatch.setattr(FederatedHandler, "attach", keeping(kept, FederatedHandler.attach))
        run_bundle(folder, epochs=3) if run is None else run_bundle(folder)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        assert kept["trainer"].state.epoch == 3
        weights.append(m.weights(kept["trainer"].network))
    assert m.same(*weights)


def keeping(kept: dict[str, Any], attach: Any) -> Any:
    """Wrap `attach` so that it also keeps the trainer."""

    def attached(self: Any, engine: Any) -> None:
        kept["trainer"] = engine
        attach(self, engine)

    return attached


@pytest.mark.parametrize("kind", [monai_bundles.nifti, monai_bundles.dicom], ids=["nifti", "dicom"])
def test_medical_images_through_monais_readers(site, tmp_path, kind) -> None:
    run = site(rounds=2)
    folder = monai_bundles.write(tmp_path / "bundle", monai_bundles.config(files=kind(tmp_path / "volumes")))
    run_bundle(folder)
    assert updates(run, "num_examples") == [4, 4]
    lines = [e.data["metrics"] for e in run.events if e.kind == "report"]
    assert all(0 < line["mean_dice_1"] < 1 for line in lines)  # per class, and with it per site: see the history


@pytest.mark.parametrize(
    ("override", "steps"),
    [
        ({"federated_handler#every": 2}, [2, 2]),
        ({"federated_handler#every": "2 epochs"}, [6, 6]),
        ({"epochs": 1}, [3, 3]),
    ],
)
def test_arguments_of_the_handler_and_of_the_bundle(site, tmp_path, override, steps) -> None:
    run = site(rounds=2)
    run_bundle(monai_bundles.write(tmp_path / "bundle", monai_bundles.config()), **override)
    assert updates(run, "local_steps") == steps


def test_bundle_computes_with_the_epochs_of_the_federation(site, tmp_path, capsys) -> None:
    site(rounds=4, every="2 epochs")
    made = monai_bundles.config(finalize=["$print('horizon', @lr_scheduler.T_max, @num_epochs)"], epochs="num_epochs")
    run_bundle(monai_bundles.write(tmp_path / "bundle", made))
    assert "horizon 8 8" in capsys.readouterr().out


# --- by hand -----------------------------------------------------------------------------------------------------


def workflow(folder: str, fragment: dict[str, Any] | None = None) -> ConfigWorkflow:
    files = [f"{folder}/configs/train.json"]
    if fragment is not None:
        Path(folder, "configs", "federated.json").write_text(json.dumps(fragment))
        files.append(f"{folder}/configs/federated.json")
    return ConfigWorkflow(config_file=files, bundle_root=folder)


@pytest.mark.parametrize(
    "fragment",
    [
        {"+train#handlers": [{"_target_": TARGET, "every": 2}]},
        {
            "federated": {"_target_": TARGET, "every": 2},
            "+initialize": ["$@federated.attach(@train#trainer)"],
        },
    ],
    ids=["handlers", "initialize"],
)
def test_fragment_of_configuration_merged_by_hand(site, tmp_path, fragment) -> None:
    run = site(rounds=2)
    bundle = workflow(monai_bundles.write(tmp_path / "bundle", monai_bundles.config()), fragment)
    bundle.initialize()
    bundle.run()
    assert updates(run, "local_steps") == [2, 2]
    assert m.same(m.weights(bundle.trainer.network), run.model())
    assert (run.folder / "sites" / "site-1" / "bundle" / "models" / "model.pt").is_file()


def test_handler_attached_to_an_initialised_workflow(site, tmp_path) -> None:
    run = site(rounds=2)
    bundle = workflow(monai_bundles.write(tmp_path / "bundle", monai_bundles.config()))
    bundle.initialize()
    FederatedHandler(every=2).attach(bundle.trainer)
    bundle.run()
    assert updates(run, "local_steps") == [2, 2]


def test_bundle_that_has_the_handler_already_gets_no_second_one(site, tmp_path) -> None:
    run = site(rounds=2)
    made = monai_bundles.config()
    made["train"]["handlers"].append({"_target_": TARGET, "every": 2})
    run_bundle(monai_bundles.write(tmp_path / "bundle", made))
    assert updates(run, "local_steps") == [2, 2]


# --- what is wrong with a bundle ---------------------------------------------------------------------------------


def test_bundle_without_a_trainer_says_where_it_looked(tmp_path) -> None:
    made = {"network": {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}, "run": "$@network(1)"}
    folder = monai_bundles.write(tmp_path / "bundle", {**made, "trainer": {"lr": 1}})
    with pytest.raises(ConfigError, match="'train#trainer', 'trainer'") as error:
        run_bundle(folder)
    assert "train.json" in str(error.value) and "--trainer_id" in str(error.value)
    with pytest.raises(ConfigError, match="looked for 'mine'"):
        run_bundle(folder, trainer_id="mine")


def test_bundle_with_several_trainers(site, tmp_path) -> None:
    made = monai_bundles.config(trainer="train#first")
    made["train"]["second"] = dict(made["train"]["first"])
    folder = monai_bundles.write(tmp_path / "bundle", made)
    with pytest.raises(ConfigError, match="train#first, train#second"):
        run_bundle(folder)
    run = site(rounds=1)
    run_bundle(folder, trainer_id="train#first")
    assert len(run.result().rounds) == 1


def test_bundle_without_anything_to_run(tmp_path) -> None:
    made = monai_bundles.config(run="go")
    folder = monai_bundles.write(tmp_path / "bundle", made)
    with pytest.raises(ConfigError, match="'run' and 'training'") as error:
        run_bundle(folder)
    assert "go" in error.value.fix and "--run_id" in error.value.fix


def test_folder_that_is_no_bundle(tmp_path) -> None:
    with pytest.raises(ConfigError, match="configs/train.json, configs/train.yaml"):
        run_bundle(str(tmp_path))
    with pytest.raises(ConfigError, match="no such bundle"):
        run_bundle(str(tmp_path / "nowhere"))


def test_error_of_the_federation_is_not_buried_in_those_of_expressions(site, tmp_path) -> None:
    run = site(rounds=2)
    folder = monai_bundles.write(tmp_path / "bundle", monai_bundles.config())
    with pytest.raises(ConfigError, match="matches no tensor"):
        run_bundle(folder, **{"federated_handler#keep_local": ["nothing.*"]})
    with pytest.raises(QuorumError, match="matches no tensor"):
        run.result()  # the site has left at once
    site(rounds=2)
    with pytest.raises(RuntimeError, match="Failed to|optimizer"):
        run_bundle(folder, **{"optimizer#lr": -1})


# --- the commands ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_simulated_bundle(tmp_path) -> None:
    """Each site has its own data and weights; JSON at the end; a file outside the bundle is not touched."""
    made = monai_bundles.config(seed="$@federated_site.index")
    data = made["train"]["trainer"]["train_data_loader"]["dataset"]
    data["data"] = monai_bundles.MADE.replace("manual_seed({seed})", "manual_seed(@seed)").format(count="2 + 2 * @seed")
    monai_bundles.write(tmp_path / "spleen", made)
    done = command(
        *("simulate", "-m", "fl_adapters.monai", "run", "spleen", "--sites", "2", "--rounds", "2", "--json"),
        *("--lr_scheduler#T_max", "5"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rounds"] == 2 and "mean_dice_2" in result["metrics"][-1]
    rows = Path(result["folder"], "history.csv").read_text().splitlines()
    assert [line.split(",")[3] for line in rows[1:3]] == ["2", "4"]  # num_examples
    for name in ("site-1", "site-2"):
        assert Path(result["folder"], "sites", name, "models", "model.pt").is_file()
    torch.load(Path(result["model"], "model.pt"), weights_only=True)


@pytest.mark.slow
def test_command_runs_a_bundle_alone_and_with_a_kit(federation, tmp_path) -> None:
    folder = monai_bundles.write(tmp_path / "bundle", monai_bundles.config())
    alone = command("bundle", "run", folder, "--epochs", "1")
    assert alone.returncode == 0, alone.stderr
    assert alone.stderr.count("no startup kit") == 1 and Path(folder, "models", "model.pt").is_file()
    run = federation(rounds=2, sockets=True)
    done = command("bundle", "run", folder, "--kit", run.places[0].kit, "--federated_handler#every", "2")
    assert done.returncode == 0, done.stderr
    assert updates(run, "local_steps") == [2, 2]


def test_command_says_what_is_wrong_without_a_traceback(tmp_path) -> None:
    done = command("bundle", "run", str(tmp_path / "nowhere"))
    assert done.returncode == 1 and "no such bundle" in done.stderr and "Traceback" not in done.stderr
    help_text = command("bundle", "--help")
    assert help_text.returncode == 0 and "run DIR" in help_text.stdout


def test_command_without_monai_says_what_to_install(tmp_path) -> None:
    (tmp_path / "ignite").mkdir()
    (tmp_path / "ignite" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'ignite'\")")
    path = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)])
    done = subprocess.run(
        [sys.executable, "-m", "fl_adapters", "bundle", "run", "."],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "pip install 'fl-adapters[monai]'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
