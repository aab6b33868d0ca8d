"""`fl-adapters simulate` as users meet it: real processes, real sockets, small NumPy scripts."""

from __future__ import annotations

import csv
import html
import json
import os
import re
import shlex
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from fl_adapters.environments.simulation import Simulation
from fl_adapters.job import Job
from fl_runtime.errors import ConfigError, SiteFailedError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.types import Event

KEYS = {"job", "rounds", "sites", "wall_s", "startup_s", "round_s", "bytes_up", "bytes_down", "metrics", "model"}


def test_the_federation_averages_and_leaves_its_results(bench: Any, adding: str) -> None:
    result = bench.json("simulate", adding, "--sites", "3", "--rounds", "4", "--name", "first")

    assert result.keys() >= KEYS
    assert (result["job"], result["rounds"], result["sites"]) == ("first", 4, 3)
    assert len(result["round_s"]) == len(result["metrics"]) == 4
    assert result["metrics"][3]["train_loss"] == pytest.approx(0.25)
    assert 0 < result["startup_s"] < result["wall_s"]
    assert result["bytes_up"] > 3 * 4 * 48
    step = (1 * 10 + 2 * 20 + 3 * 30) / 60
    model = read_tensors(Path(result["model"]) / "model.safetensors")
    np.testing.assert_allclose(model["w"], np.full((4, 3), 4 * step, np.float32), rtol=1e-6)
    folder = bench.folder / "runs" / "first"
    rows = list(csv.DictReader((folder / "history.csv").open()))
    sites = [row["site"] for row in rows if row["round"] == "4"]
    assert sites == ["site-1", "site-2", "site-3", "global"]
    kinds = [json.loads(line)["kind"] for line in (folder / "events.jsonl").open()]
    assert kinds.count("round_finished") == 4
    assert "finished" in kinds
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert (folder / "best" / "model.safetensors").exists()
    shown = f"all sites, round 4: {float(rows[-1]['train_loss']):.4g}"
    assert shown in (folder / "report.html").read_text()
    assert Job.from_file(folder / "job.yml").rounds == 4
    assert all((folder / "sites" / name / "log.txt").exists() for name in ("site-1", "site-2", "site-3"))


def test_without_a_terminal_there_is_a_line_per_round_and_a_summary(bench: Any, adding: str) -> None:
    done = bench.run("simulate", adding, "--sites", "2", "--rounds", "3")

    assert done.returncode == 0, done.stderr
    assert sum(": train_loss" in line for line in done.stdout.splitlines()) == 3
    for left in ("model", "best", "history.csv", "report.html", "sites"):
        assert left in done.stdout


def test_the_best_round_is_chosen_by_the_metric_that_the_options_name(bench: Any, adding: str) -> None:
    best = ("--best-metric", "train_loss", "--best-mode", "max")
    result = bench.json("simulate", adding, "--sites", "1", "--rounds", "2", "--name", "named", *best)
    assert result["best_round"] == 1  # the training loss falls
    assert (bench.folder / "runs" / "named" / "best" / "model.safetensors").exists()
    job = Job.from_file(bench.folder / "runs" / "named" / "job.yml")
    assert (job.best_metric, job.best_mode) == ("train_loss", "max")
    report = (bench.folder / "runs" / "named" / "report.html").read_text()
    command = shlex.split(html.unescape(re.findall("<pre>(fl-adapters simulate .*?)</pre>", report)[0]))
    again = bench.json(*command[1:])  # what the report says repeats the run
    assert again["job"] == "named-again"
    assert (again["metrics"], again["best_round"]) == (result["metrics"], result["best_round"])


def test_without_a_score_there_is_no_best_round_and_the_end_says_why(bench: Any) -> None:
    script = bench.script(
        "silent.py",
        """
import numpy as np
import fl_adapters as fl

with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(1)}):
        task.submit({"w": task.arrays["w"] + 1}, num_examples=1)
""",
    )
    done = bench.run("simulate", script.name, "--sites", "1", "--rounds", "2", "--name", "silent")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("there is no best round: no site reported 'loss'") == 1
    folder = bench.folder / "runs" / "silent"
    assert (folder / "model" / "model.safetensors").exists() and not (folder / "best").exists()


def test_a_mistyped_best_metric_ends_the_run_in_round_1(bench: Any) -> None:
    script = bench.script(
        "scored.py",
        """
import numpy as np
import fl_adapters as fl

with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(1)}):
        if task.round > 1:
            task.report({"accuracy": 0.5, "loss": 1.0}, 1)
        task.submit({"w": task.arrays["w"] + 1}, num_examples=1)
""",
    )
    done = bench.run(
        "simulate", script.name, "--sites", "2", "--rounds", "9", "--best-metric", "acuracy", "--name", "x"
    )
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "'acuracy'" in said and "reported: accuracy, loss" in said and "did you mean 'accuracy'" in said
    for site in ("site-1", "site-2"):
        assert "ConfigError" in (bench.folder / "runs" / "x" / "sites" / site / "log.txt").read_text()


def test_each_site_has_a_name_arguments_and_resources_of_its_own(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "8,9,10,11,12,13,14,15")
    script = """
import json, os, sys
import numpy as np
import fl_adapters as fl

me = fl.site()
names = ("MASTER_PORT", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_PREALLOCATE")
facts = {name: os.environ.get(name) for name in names}
with open(f"facts-{me.name}.json", "w") as out:
    json.dump(facts | {"site": [me.name, me.index, me.count, me.job], "args": sys.argv[1:]}, out)
print("hello from", me.name)
with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(1)}):
        task.submit(task.arrays, num_examples=1)
"""
    (bench.folder / "package").mkdir()
    bench.script("package/train.py", script)
    ours = [
        "simulate",
        "--json",
        "-m",
        "package.train",
        "--lr",
        "0.1",
        "--sites",
        "north,south",
        "--gpus",
        "4,7",
        "--name",
        "n",
    ]
    done = bench.run(*ours, "--rounds", "1", "--", "--name", "mine")
    assert done.returncode == 0, done.stderr

    north, south = (json.loads((bench.folder / f"facts-{name}.json").read_text()) for name in ("north", "south"))
    assert north["site"] == ["north", 0, 2, "n"]
    assert south["site"] == ["south", 1, 2, "n"]
    assert north["args"] == ["--lr", "0.1", "--name", "mine"]
    assert (north["CUDA_VISIBLE_DEVICES"], south["CUDA_VISIBLE_DEVICES"]) == ("12", "15")
    assert north["MASTER_PORT"] != south["MASTER_PORT"]
    assert int(north["OMP_NUM_THREADS"]) >= 1
    assert north["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert (bench.folder / "runs/n/sites/north/log.txt").read_text() == "hello from north\n"


# -- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_dying_site_ends_the_run_and_shows_its_log_and_status(bench: Any, adding: str) -> None:
    dying = bench.script("dying.py", _failing_in_round_2('raise ValueError("the disk of site-2 is full")'))
    done = bench.run("simulate", dying.name, "--rounds", "3")

    assert done.returncode == 1
    assert "site-2's process ended in round 2: exit status 1" in done.stderr
    assert "ValueError: the disk of site-2 is full" in done.stderr
    assert "sites/site-2/log.txt" in done.stderr
    assert "min_sites below 3" in done.stderr


def test_sites_that_all_fail_show_the_cause_and_no_advice_to_leave_one_out(bench: Any) -> None:
    script = bench.script(
        "unreadable.py",
        """
def read(depth):
    if depth:
        return read(depth - 1) if depth % 2 else again(depth - 1)
    raise OSError("parts/train.csv cannot be read")

def again(depth):
    return read(depth)

try:
    read(40)
except OSError as error:
    def wrapped(depth):
        if depth:
            return wrapped(depth - 1) if depth % 2 else once_more(depth - 1)
        raise RuntimeError("no data") from error

    def once_more(depth):
        return wrapped(depth)

    wrapped(40)
""",
    )
    done = bench.run("simulate", script.name, "--sites", "2", "--rounds", "2")
    assert done.returncode == 1
    assert "OSError: parts/train.csv cannot be read" in done.stderr
    assert "RuntimeError: no data" in done.stderr
    assert "every other site's ended alike" in done.stderr
    assert "min_sites" not in done.stderr


def test_a_killed_site_is_named_with_its_signal_in_json(bench: Any) -> None:
    script = bench.script("killed.py", _failing_in_round_2("import os; os.kill(os.getpid(), 9)"))
    done = bench.run("simulate", script.name, "--rounds", "3", "--json")

    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "site-failed"
    assert "site-2" in error["what"]
    assert "SIGKILL" in error["what"]


EXACT = """
import os, pathlib, signal, sys
import numpy as np
import fl_adapters as fl

kind, lives = sys.argv[1], 1 if sys.argv[1] == "undisturbed" else int(sys.argv[2])
with fl.connect() as site:
    momentum = np.zeros(3)
    def load(state):
        momentum[:] = state
    for task in site.tasks(initial={"w": np.zeros(3)}, save=lambda: momentum, load=load):
        died = pathlib.Path(f"died-{kind}-{task.round}-{len(list(pathlib.Path().glob('died-*')))}")
        if kind != "undisturbed" and site.index == 1 and task.round == 2 and lives > int(died.name.split("-")[-1]):
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        momentum += np.random.normal(size=3)
        task.submit({"w": task.arrays["w"] + momentum}, num_examples=1 + site.index)
"""


def test_with_exact_restart_a_killed_site_is_started_again_and_ends_with_the_same_bits(bench: Any) -> None:
    script = bench.script("exact.py", EXACT)

    def run(*arguments: str) -> tuple[bytes, str]:
        text = f"name: {arguments[0]}\nrounds: 3\nsites: 2\nexact_restart: true\n"
        bench.script(f"{arguments[0]}.yml", text)
        done = bench.run("simulate", script.name, *arguments, "--job", f"{arguments[0]}.yml")
        assert done.returncode == 0, done.stderr
        model = bench.folder / "runs" / arguments[0] / "model" / "model.safetensors"
        return read_tensors(model)["w"].tobytes(), done.stdout + done.stderr  # the file has the job's name too

    wanted, _ = run("undisturbed")
    found, said = run("disturbed", "2")
    assert found == wanted
    assert said.count("site-2: killed by SIGKILL") == 2 and "started again" in said


def test_a_site_that_is_killed_again_and_again_in_one_round_is_given_up(bench: Any) -> None:
    script = bench.script("exact.py", EXACT)
    bench.script("exact.yml", f"app: {script.name}\nrounds: 3\nsites: 2\nexact_restart: true\n")
    done = bench.run("simulate", script.name, "disturbed", "99", "--job", "exact.yml")
    assert done.returncode == 1
    assert "site-2's process ended in round 2: killed by SIGKILL" in done.stderr
    assert len(list(bench.folder.glob("died-*"))) == 4


def test_with_a_lower_quorum_the_others_go_on(bench: Any) -> None:
    script = bench.script("dying.py", _failing_in_round_2('raise ValueError("the disk of site-2 is full")'))
    done = bench.run("simulate", script.name, "--rounds", "3", "--min-sites", "2", "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == 3
    assert "the disk of site-2 is full" in done.stderr


def test_a_script_that_fails_after_the_last_round_is_a_failure(bench: Any, adding: str) -> None:
    script = bench.script("late.py", (bench.folder / adding).read_text() + '\nraise OSError("cannot save")\n')
    done = bench.run("simulate", script.name, "--sites", "1", "--rounds", "1")

    assert done.returncode == 1
    assert "after the last round" in done.stderr
    assert "cannot save" in done.stderr


@pytest.mark.parametrize("module_ending", ["", "\nimport sys; sys.exit(3)"])
def test_a_script_that_never_exchanges_is_told_what_to_add(bench: Any, module_ending: str) -> None:
    script = bench.script("never.py", 'print("trained alone")' + module_ending)
    done = bench.run("simulate", script.name, "--sites", "2")

    assert done.returncode == 1
    assert "trained alone" in done.stderr
    if module_ending:
        assert "ended before it joined: exit status 3" in done.stderr
    else:
        assert "without exchanging" in done.stderr
        assert "FederatedCallback()" in done.stderr
        assert "fl_adapters.connect()" in done.stderr


def test_a_port_in_use_is_named(bench: Any, adding: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = bench.run("simulate", adding, "--rounds", "1", "--port", port, "--name", "again")

    assert done.returncode == 1
    assert port in done.stderr
    assert "to do:" in done.stderr
    assert bench.runs == []  # the name stays free


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--sites", "2", "--min-sites", "3"], ["min_sites is 3", "2 sites"]),
        (["--strategy", "fedmagic"], ["unknown strategy 'fedmagic'", "fedavg"]),
        (["--sites", "0"], ["0 sites"]),
        (["--sites", "a,a"], ["listed twice"]),
        (["--every", "weekly"], ["weekly"]),
        (["--name", "a/b"], ["'a/b'"]),
        (["--job", "none.yml"], ["none.yml"]),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(
    bench: Any, adding: str, options: list[str], wanted: list[str]
) -> None:
    done = bench.run("simulate", adding, *options)

    assert done.returncode == 1
    assert all(text in done.stderr for text in wanted), done.stderr
    assert "to do:" in done.stderr
    assert "Traceback" not in done.stderr
    assert bench.runs == []


def test_a_name_that_is_taken_is_refused_if_chosen_and_numbered_if_not(
    bench: Any, adding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench.folder)
    simulation = Simulation(sites=1, quiet=True)
    unnamed = Job(app=adding, rounds=1)
    names = [unnamed.run(simulation).job, unnamed.run(simulation).job]
    assert names == [unnamed.name, f"{unnamed.name}-2"]

    with pytest.raises(ConfigError, match="exists already") as refused:
        Job(app=adding, rounds=1, name=names[0]).run(simulation)
    assert "choose another name" in refused.value.fix


def test_from_python_a_failure_is_raised_and_listeners_hear_of_everything(
    bench: Any, adding: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bench.folder)
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise RuntimeError("not my day")

    result = Job(app=adding, rounds=2).run(Simulation(sites=2, listeners=(broken, heard.append)))
    assert [item.round for item in result.rounds] == [1, 2]
    kinds = [event.kind for event in heard]
    assert kinds.index("starting") < kinds.index("joined") < kinds.index("started") < kinds.index("finished")
    assert kinds.count("exited") == 2
    said = capfd.readouterr().err
    assert said.count("not my day") == 1
    assert "round 2/2" in said

    failing = bench.script("failing.py", _failing_in_round_2("raise SystemExit(4)")).name
    with pytest.raises(SiteFailedError, match="exit status 4"):
        Job(app=failing, rounds=2).run(Simulation(sites=2, quiet=True))


# -- being stopped --------------------------------------------------------------------------------------------------

LASTING = """
import os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import fl_adapters as fl

me = fl.site()
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: Path(f"asked-{me.name}").touch())
sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
helpers = [subprocess.Popen(sleeping, start_new_session=own) for own in (True, False)]
with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(1)}):
        if task.round == 2:
            Path(f"pids-{me.name}").write_text(" ".join(str(pid) for pid in [os.getpid(), *(h.pid for h in helpers)]))
            while True:
                time.sleep(0.1)
        task.submit(task.arrays, num_examples=1)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_every_process_and_leaves_the_run(bench: Any, until: Any, how: signal.Signals) -> None:
    command = bench.start(
        "simulate", bench.script("lasting.py", LASTING).name, "--sites", "2", "--rounds", "3", "--json"
    )
    pids = _pids_of_sites(bench, until)
    command.send_signal(how)
    out, err = command.communicate(timeout=60)

    assert command.returncode == 130
    assert "Ctrl-C" in json.loads(out.splitlines()[-1])["error"]["what"]
    until(lambda: not any(map(_alive, pids)), "the end of all processes")
    (run,) = bench.runs
    folder = bench.folder / "runs" / run
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert {row["round"] for row in rows} >= {"1", "2"}
    assert (folder / "model" / "model.safetensors").exists()
    assert "Traceback" not in err


def test_a_second_ctrl_c_does_not_wait_for_stubborn_sites(bench: Any, until: Any) -> None:
    script = bench.script("lasting.py", LASTING).name
    command = bench.start("simulate", script, "stubborn", "--sites", "2", "--rounds", "3")
    pids = _pids_of_sites(bench, until)
    command.send_signal(signal.SIGINT)
    until(lambda: len(list(bench.folder.glob("asked-*"))) == 2, "both sites to be asked to end")
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=60)

    assert command.returncode == 130
    until(lambda: not any(map(_alive, pids)), "the end of all processes")


@pytest.mark.skipif(os.name != "posix", reason="the watchdog is POSIX only")
def test_killing_the_simulation_outright_ends_the_sites_too(bench: Any, until: Any) -> None:
    command = bench.start("simulate", bench.script("lasting.py", LASTING).name, "--sites", "2", "--rounds", "3")
    pids = _pids_of_sites(bench, until)
    command.kill()
    command.communicate(timeout=60)

    until(lambda: not any(map(_alive, pids)), "the end of all processes")


def _pids_of_sites(bench: Any, until: Any) -> list[int]:
    """Return the site processes and their children once both sites are in the middle of round 2."""

    def written() -> list[str]:
        return [path.read_text() for path in bench.folder.glob("pids-*")]

    until(lambda: len(list(filter(None, written()))) == 2, "both sites to be in round 2")
    return [int(pid) for text in written() for pid in text.split()]


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _failing_in_round_2(statement: str) -> str:
    return f"""
import numpy as np
import fl_adapters as fl

with fl.connect() as site:
    for task in site.tasks(initial={{"w": np.zeros(3)}}):
        if task.round == 2 and site.index == 1:
            {statement}
        task.submit(task.arrays, num_examples=1)
"""
