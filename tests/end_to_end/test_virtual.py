"""Virtual sites as users meet them: a function in a file, a few real worker processes, a simulation's results."""

from __future__ import annotations

import csv
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from virtual_sites import NOISY, assert_same, averaged, model_of, noisy, script, simulated

import fl_adapters as fl
from fl_adapters import Simulation
from fl_adapters.environments.progress import RunView
from fl_runtime.errors import ConfigError, QuorumError, SiteFailedError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.types import Event


def test_the_mean_is_that_of_numpy_whatever_the_number_of_workers(here: Path) -> None:
    app = script(NOISY)
    for workers in (1, 3):
        result = simulated(app, workers=workers)
        assert_same(model_of(result), averaged(50, 3))

    assert [len(item.sites) for item in result.rounds] == [50, 50, 50]
    assert result.rounds[0].bytes_up == 50 * (120 + 7) * 4 == result.rounds[0].bytes_down
    assert result.rounds[1].metrics == {"train_loss": 0.5}
    rows = list(csv.DictReader((result.folder / "history.csv").open()))
    third = [row for row in rows if row["round"] == "3"]
    assert [row["site"] for row in third] == [*(f"site-{n}" for n in range(1, 51)), "global"]
    assert {row["status"] for row in third[:-1]} == {"used"}
    assert third[6]["num_examples"] == "2"
    assert third[-1]["num_examples"] == str(sum(i % 5 + 1 for i in range(50)))
    assert not (result.folder / "server" / "updates").exists()


def test_a_fraction_of_the_sites_takes_part(here: Path) -> None:
    view, shown = RunView(), []

    def watch(event: Event) -> None:
        view(event)
        if event.kind == "update":
            shown.append(view.round_done)

    result = simulated(script(NOISY), fraction=0.2, seed=5, listeners=[watch])
    assert view.virtual and shown == pytest.approx([number / 10 for number in range(1, 11)] * 3)

    taken = [[int(site.removeprefix("site-")) - 1 for site in item.sites] for item in result.rounds]
    assert [len(sites) for sites in taken] == [10, 10, 10]
    assert taken[0] != taken[1]
    assert_same(model_of(result), averaged(50, 3, lambda round: taken[round - 1]))


def test_a_strategy_that_needs_all_updates_at_once_gets_them(here: Path) -> None:
    result = simulated(script(NOISY), sites=21, rounds=2, strategy="median")

    model: Mapping[str, Any] = {"w": np.zeros((40, 3), np.float32), "b": np.ones(7, np.float32)}
    for round in (1, 2):
        updates = [noisy(index, round, model) for index in range(21)]
        model = {name: np.median([update[name] for update in updates], axis=0) for name in model}
    assert_same(model_of(result), model)


def test_the_global_random_states_are_the_sites_own(here: Path) -> None:
    app = script("""
        import random
        import numpy as np

        def initial():
            return {"w": np.zeros(4)}

        def train(task, site):
            drawn = np.random.rand(4) + random.random() + task.seed % 7
            task.submit({"w": task.arrays["w"] + drawn}, num_examples=1)
    """)
    one, three, other = (
        model_of(simulated(app, sites=7, workers=workers, seed=seed)) for workers, seed in ((1, 1), (3, 1), (3, 2))
    )
    assert_same(one, three)
    assert one["w"].tobytes() != other["w"].tobytes()


def test_a_function_of_a_notebook_is_given_as_it_is(here: Path) -> None:
    step = np.float32(2)

    def train(task: fl.SiteTask, site: fl.Site) -> None:
        task.submit({"w": task.arrays["w"] + step}, num_examples=1)

    result = simulated("a notebook", function=train, initial={"w": np.zeros(3, np.float32)})
    np.testing.assert_array_equal(model_of(result)["w"], np.full(3, 6, np.float32))


def test_scores_of_the_global_model_choose_the_best_round(here: Path) -> None:
    result = simulated(
        script("""
            import numpy as np

            def initial():
                return {"w": np.zeros(2, np.float32)}

            def train(task, site):
                task.report({"loss": abs(float(task.arrays["w"][0]) - 2)}, 10)
                task.arrays["w"][:] += 1
                task.submit(task.arrays, num_examples=3)
        """),
        rounds=4,
    )
    assert result.best_round == 2
    assert [item.metrics.get("loss") for item in result.rounds] == [1.0, 0.0, 1.0, None]
    assert result.best is not None
    np.testing.assert_array_equal(read_tensors(result.best / "model.safetensors")["w"], [2, 2])


@pytest.mark.parametrize(
    "score",
    ["task.report({'loss': abs(task.round - 1 - 2)}, 1)", "metrics['loss'] = abs(task.round - 2)"],
    ids=["of models", "of training"],
)
def test_patience_ends_the_run_by_either_kind_of_score(here: Path, score: str) -> None:
    """The model of round 2 is the best, so rounds 3 and 4 bring no improvement."""
    result = simulated(
        script(f"""
            import numpy as np

            initial = {{"w": np.zeros(2, np.float32)}}

            def train(task, site):
                metrics = {{}}
                {score}
                task.submit(task.arrays, num_examples=3, metrics=metrics)
        """),
        sites=3,
        rounds=9,
        patience=2,
    )
    assert (len(result.rounds), result.best_round) == (4, 2)


def test_what_is_submitted_may_be_any_view_of_what_came(here: Path) -> None:
    """Updates are written to the task's own arrays, which must not show."""
    result = simulated(
        script("""
            import numpy as np

            def initial():
                return {"a": np.zeros(3, np.float32), "b": np.ones(3, np.float32)}

            def train(task, site):
                task.submit({"b": task.arrays["a"], "a": task.arrays["b"][::-1]}, num_examples=1)
        """),
        rounds=1,
    )
    found = model_of(result)
    np.testing.assert_array_equal([found["a"], found["b"]], [np.ones(3), np.zeros(3)])


def test_arguments_reach_the_module(bench: Any) -> None:
    bench.script(
        "train.py",
        """
import sys
import numpy as np

STEP = int(sys.argv[1])

def initial():
    return {"w": np.zeros(2, np.float32)}

def train(task, site):
    task.submit({"w": task.arrays["w"] + STEP}, num_examples=1)
""",
    )
    found = bench.json("simulate", "train.py:train", "5", "--sites", "3", "--rounds", "2", "--engine", "processes")
    model = read_tensors(Path(found["model"]) / "model.safetensors")
    np.testing.assert_array_equal(model["w"], [10, 10])


FAILING = """
import numpy as np

def initial():
    return {"w": np.zeros(4, np.float32)}

def train(task, site):
    if site.name == "site-7" and task.round == 2:
        raise ValueError("no data here")
    task.submit({"w": task.arrays["w"] + 1}, num_examples=1)
"""


def test_an_error_names_site_round_and_exception(here: Path) -> None:
    with pytest.raises(
        SiteFailedError, match="site-7's function failed in round 2: ValueError: no data here"
    ) as raised:
        simulated(script(FAILING))
    assert 'raise ValueError("no data here")' in raised.value.where


def test_a_quorum_goes_on_without_a_site_that_failed(here: Path) -> None:
    result = simulated(script(FAILING), min_sites=49)

    assert [len(item.sites) for item in result.rounds] == [50, 49, 49]
    assert result.rounds[1].missing == ("site-7",)
    np.testing.assert_array_equal(model_of(result)["w"], np.full(4, 3, np.float32))


OVERFLOWING = """
import numpy as np

def initial():
    return {"w": np.zeros(4, np.float32)}

def train(task, site):
    large = {"site-4": 3e38, "site-12": -3e38}.get(site.name) if task.round == 2 else None
    task.submit({"w": np.full(4, large, np.float32) if large else task.arrays["w"] + 1}, num_examples=1)
"""


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm:lr=1,momentum=0"])
def test_sites_whose_updates_make_no_model_are_left_out(here: Path, strategy: str) -> None:
    """Also where updates are not held but summed as they come. The round is done again to find out who it was."""
    app = script(OVERFLOWING)
    result = simulated(app, sites=20, min_sites=2, strategy=strategy)

    assert [len(item.sites) for item in result.rounds] == [20, 18, 18]
    np.testing.assert_allclose(model_of(result)["w"], np.full(4, 3, np.float32), rtol=1e-6)
    with pytest.raises(QuorumError, match="only 18 sites are left") as raised:
        simulated(app, sites=20, strategy=strategy, min_sites=19)
    assert "site-4 is excluded from this run: round 2 failed with its updates" in raised.value.where


def test_a_run_that_ended_with_an_error_goes_on_from_its_last_round(here: Path) -> None:
    app = script(NOISY + "    if site.index == 30 and task.round == 3 and not __import__('os').path.exists('mended'):\n"
                 "        raise OSError('broken')\n")  # fmt: skip
    with pytest.raises(SiteFailedError, match="round 3: OSError: broken"):
        simulated(app, rounds=4, name="mine")
    Path("mended").touch()
    result = Simulation(quiet=True).resume(Path("runs", "mine"))

    assert len(result.rounds) == 4
    assert_same(model_of(result), averaged(50, 4))
    with pytest.raises(ConfigError, match="has finished"):
        Simulation(quiet=True).resume(Path("runs", "mine"))


DYING = """
import os, signal
import numpy as np

def initial():
    return {"w": np.zeros(4, np.float32)}

def train(task, site):
    if site.name == "site-3" and task.round == 2:
        deaths = len(os.listdir("deaths"))
        if deaths < %d:
            open(f"deaths/{deaths}", "w").close()
            print("about to die", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    task.submit({"w": task.arrays["w"] + site.index}, num_examples=1)
"""


@pytest.mark.parametrize("forked", [False, True])
def test_the_order_of_a_worker_that_dies_is_done_by_another(here: Path, forked: bool) -> None:
    Path("deaths").mkdir()
    app, options = script(DYING % 2), {}
    if forked:
        found: dict[str, Any] = {}
        exec(DYING % 2, found)
        options = {"function": found["train"], "initial": found["initial"]}
    result = simulated(app, sites=5, **options)

    assert len(os.listdir("deaths")) == 2
    np.testing.assert_allclose(model_of(result)["w"], np.full(4, 6, np.float32), rtol=1e-6)


def test_a_site_that_kills_every_worker_is_named(here: Path) -> None:
    Path("deaths").mkdir()
    with pytest.raises(SiteFailedError, match="site-3 in round 2, 3 times: killed by SIGKILL") as raised:
        simulated(script(DYING % 99), sites=5)
    assert "about to die" in raised.value.where
    assert len(os.listdir("deaths")) == 3


def test_a_site_that_takes_too_long_is_left_out_at_the_deadline(here: Path) -> None:
    result = simulated(
        script("""
            import threading
            import numpy as np

            def initial():
                return {"w": np.zeros(4, np.float32)}

            def train(task, site):
                if site.name == "site-2" and task.round == 1:
                    threading.Event().wait()
                task.submit({"w": task.arrays["w"] + 1}, num_examples=1)
        """),
        sites=4,
        rounds=2,
        min_sites=3,
        deadline_s=6,
    )
    assert [item.missing for item in result.rounds] == [("site-2",), ()]


def test_ctrl_c_ends_the_workers_and_the_run(here: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "round_finished" and event.round == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        simulated(script(NOISY), rounds=100_000, listeners=[interrupt])
    assert not [thread for thread in threading.enumerate() if thread.name == "fl-rounds"]


@pytest.mark.slow
def test_ray_gives_the_same_bits_and_replaces_workers_that_die(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fl-adapters[ray]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(Path(fl.__file__).parents[1]), *_path()])))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        result = simulated(script(NOISY), engine="ray")
        assert_same(model_of(result), averaged(50, 3))
        Path("deaths").mkdir()
        result = simulated(script(DYING % 1), engine="ray", sites=5)
        assert len(os.listdir("deaths")) == 1
        np.testing.assert_allclose(model_of(result)["w"], np.full(4, 6, np.float32), rtol=1e-6)
        with pytest.raises(SiteFailedError, match="site-7's function failed in round 2: ValueError: no data here"):
            simulated(script(FAILING), engine="ray")
        assert ray.is_initialized()  # it was not the simulation's to end
    finally:
        ray.shutdown()


def _path() -> list[str]:
    return [os.environ.get("PYTHONPATH", "")]


def test_the_command_line_has_virtual_sites_too(bench: Any) -> None:
    bench.script("train.py", NOISY)
    found = bench.json("simulate", "train.py:train", "--sites", "50", "--rounds", "2", "--engine", "processes",
                       "--workers", "2")  # fmt: skip
    assert (found["sites"], found["rounds"]) == (50, 2)
    assert_same(read_tensors(Path(found["model"]) / "model.safetensors"), averaged(50, 2))
