"""MLflow, W&B and TensorBoard have what a run's own history has, and its files, its model and its state."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study import until
from tracked_runs import SCRIPT, history_of

import fl_adapters as fl
from fl_adapters.environments.simulation import SimulationResult
from fl_adapters.environments.tracking import Record
from fl_runtime.errors import ConfigError, FederationError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(SCRIPT)
    return tmp_path


@pytest.fixture
def mlflow_server(here: Path) -> Iterator[str]:
    """Address of a server of MLflow, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{here}/mlflow.db"]
    command += ["--artifacts-destination", f"{here}/artifacts", "--host", "127.0.0.1", "--port", str(port)]
    with open(here / "mlflow.log", "wb") as log:
        process = subprocess.Popen([*command, "--workers", "1"], stdout=log, stderr=log, start_new_session=True)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while not _answers(f"{address}/health"):
            assert process.poll() is None and time.monotonic() < deadline, (here / "mlflow.log").read_text()
            time.sleep(0.1)
        yield address
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except OSError:
        return False


def records_of(file: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(file):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(file[at + 4 : at + 6], "little"), file[at + 6]
        if at + 7 + size > len(file):  # it is still being written
            return
        parts += file[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def simulated(name: str, *track: Any, args: tuple[str, ...] = (), **options: Any) -> SimulationResult:
    job = fl.Job(app="train.py", name=name, rounds=3, sites=("north", "south"), track=options.pop("track", ()))
    return job.run(fl.Simulation(args=args, quiet=True, trackers=track, **options))


def test_mlflow_has_what_the_history_has_and_a_resumed_run_goes_on(here: Path, mlflow_server: str) -> None:
    from mlflow import MlflowClient

    with pytest.raises(FederationError):
        simulated("tumour", args=("fail",), track=(f"mlflow:{mlflow_server}",))
    client = MlflowClient(tracking_uri=mlflow_server)
    experiment = client.get_experiment_by_name("fl-adapters").experiment_id
    (failed,) = client.search_runs([experiment])
    assert (failed.info.run_name, failed.info.status) == ("tumour", "FAILED")
    assert failed.data.params["rounds"] == "3"
    assert failed.data.params["sites"] == '["north", "south"]'

    arguments = Path("runs/tumour/simulation.json")
    arguments.write_text(arguments.read_text().replace('"fail"', '"well"'))
    result = fl.Simulation(quiet=True).resume("runs/tumour")
    (run,) = client.search_runs([experiment])
    assert (run.info.run_id, run.info.status) == (failed.info.run_id, "FINISHED")
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    found = {(name, item.step): item.value for name, items in histories.items() for item in items}
    assert found.items() >= history_of(result.folder).items()
    assert {key: found[key] for key in found if "/" not in key[0]} == {
        (name, item.round): value for item in result.rounds for name, value in item.metrics.items()
    }
    assert {step for name, step in found if name == "site/south/loss"} == {1, 2, 3}
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {
        *("report.html", "history.csv", "events.jsonl", "job.yml", "model", "best")
    }
    fetched = client.download_artifacts(run.info.run_id, "model/model.safetensors")
    assert Path(fetched).read_bytes() == (result.folder / "model" / "model.safetensors").read_bytes()


def test_a_model_of_xgboost_has_the_flavour_of_mlflow(tmp_path: Path) -> None:
    xgboost = pytest.importorskip("xgboost")
    import mlflow.xgboost

    from fl_adapters.environments.tracking.flavours import save_as_mlflow_model

    rows = np.random.default_rng(0).normal(size=(50, 3))
    data = xgboost.DMatrix(rows, label=rows[:, 0] > 0)
    booster = xgboost.train({"objective": "binary:logistic"}, data, 3)
    exported = tmp_path / "model"
    exported.mkdir()
    booster.save_model(exported / "model.ubj")
    packed = save_as_mlflow_model(exported, tmp_path / "packed")
    assert packed is not None
    np.testing.assert_array_equal(mlflow.xgboost.load_model(str(packed)).predict(data), booster.predict(data))


def test_a_model_of_transformers_is_a_pipeline_of_mlflow_and_no_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    import mlflow.transformers

    from fl_adapters.environments.tracking.flavours import save_as_mlflow_model

    words = tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}, unk_token="[UNK]")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="[PAD]", unk_token="[UNK]"
    )
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=4, **sizes)).eval()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **named: pytest.fail(f"the hub is asked: {asked}"))
    exported = Path("model")
    model.save_pretrained(exported)
    assert save_as_mlflow_model(exported, tmp_path / "weights alone") is None, "a pipeline needs a tokenizer"
    tokenizer.save_pretrained(exported)
    packed = save_as_mlflow_model(exported, tmp_path / "packed")
    assert packed is not None
    (found,) = mlflow.transformers.load_model(str(packed))("good")
    share = model(**tokenizer("good", return_tensors="pt")).logits.softmax(1).max().item()
    assert found["score"] == pytest.approx(share, rel=1e-5)
    assert not [file for file in packed.rglob("*") if file.suffix in (".bin", ".pkl", ".pth")]
    (exported / "adapter_config.json").write_text("{}")
    assert save_as_mlflow_model(exported, tmp_path / "adapter") is None


def test_a_model_of_keras_has_the_flavour_of_mlflow(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    import mlflow.keras

    from fl_adapters.environments.tracking.flavours import save_as_mlflow_model

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    (tmp_path / "best").mkdir()
    model.save(tmp_path / "best" / "model.keras")
    packed = save_as_mlflow_model(tmp_path / "best", tmp_path / "packed")
    assert packed is not None
    rows = np.ones((4, 3), np.float32)
    opened = mlflow.keras.load_model(str(packed))
    np.testing.assert_allclose(opened.predict(rows, verbose=0), model.predict(rows, verbose=0), rtol=1e-6)


def test_wandb_offline_has_what_the_history_has(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(here))
    result = simulated("tumour", "wandb:lungs")
    (file,) = here.glob("wandb/offline-run-*/run-*.wandb")
    found: dict[tuple[str, int], float] = {}
    names, exits = set(), []

    def records() -> list[Any]:
        return [wandb_internal_pb2.Record.FromString(data) for data in records_of(file.read_bytes())]

    # W&B's own process writes the file, and may do so after the run has been ended here
    until(lambda: any(record.HasField("exit") for record in records()), "the run's end in its file")
    for record in records():
        values = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
        if "round" in values:
            number = int(values.pop("round"))
            found |= {(name, number): float(value) for name, value in values.items() if not name.startswith("_")}
        if record.HasField("run"):
            names.add((record.run.project, record.run.display_name))
        if record.HasField("exit"):
            exits.append(record.exit.exit_code)
    assert found == history_of(result.folder)
    assert ("lungs", "tumour") in names
    assert exits == [0]


def test_tensorboard_has_what_the_history_has_beside_a_function(here: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    taken: list[Record] = []
    result = simulated("tumour", "tensorboard:curves", taken.append)
    read = EventAccumulator(str(here / "curves" / "tumour")).Reload()
    found = {(tag, item.step): item.value for tag in read.Tags()["scalars"] for item in read.Scalars(tag)}
    wanted = history_of(result.folder)
    assert found == {key: float(np.float32(value)) for key, value in wanted.items()}
    assert {(p.name, p.round): p.value for item in taken[1:-1] for p in item.points} == wanted
    assert (taken[-1].state, taken[-1].folder) == ("finished", result.folder)
    assert not Path("runs/tumour/job.yml").read_text().count("track")


@pytest.mark.parametrize(
    ("target", "what", "fix"),
    [
        ("neptune", "'neptune'", "write mlflow:URI"),
        ("mlflow", "'mlflow'", "write mlflow:URI"),
        ("mlflow:http://host:many", "'http://host:many' is no address", "write mlflow:http://HOST:PORT"),
        ("mlflow:http://:5000", "'http://:5000' is no address", "write mlflow:http://HOST:PORT"),
        ("mlflow:http://ann:secret@host", "has a password", "MLFLOW_TRACKING_PASSWORD"),
        (5, "by 5", "Simulation(trackers=[...])"),
    ],
)
def test_what_cannot_track_is_refused_before_anything_is_made(target: Any, what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as refused:
        fl.Job(app="train.py", track=target)
    assert what in refused.value.what and fix in refused.value.fix and "secret" not in str(refused.value)


@pytest.mark.parametrize(("target", "extra"), [("mlflow:sqlite:///x.db", "mlflow"), ("wandb", "wandb")])
def test_a_missing_package_is_named_before_the_first_step(
    here: Path, target: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(ConfigError) as refused:
        simulated("tumour", track=(target,))
    assert refused.value.fix == f"pip install 'fl-adapters[{extra}]'"
    assert not Path("runs/tumour").exists()


def test_an_mlflow_that_does_not_answer_is_named_before_the_first_step(here: Path) -> None:
    with socket.socket() as closed:  # bound, so that nobody else listens there
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ConfigError) as refused:
            simulated("tumour", track=(f"mlflow:{address}",))
    assert f"no MLflow server answers at {address}" in refused.value.what and "mlflow server" in refused.value.fix
    with pytest.raises(ConfigError) as refused:
        simulated("tumour", track=("mlflow:ftp://host/runs",))
    assert "'ftp://host/runs'" in refused.value.what and "mlflow:sqlite:///mlflow.db" in refused.value.fix
    assert not Path("runs/tumour").exists()


def test_wandb_without_a_key_is_refused_rather_than_asked_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(here / "none"))
    monkeypatch.setenv("HOME", str(here))
    with pytest.raises(ConfigError) as refused:
        simulated("tumour", "wandb")
    assert "WANDB_MODE=offline" in refused.value.fix
