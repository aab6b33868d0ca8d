"""The command line without a run: options, help, version, `doctor`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_adapters.cli.doctor import command as doctor
from fl_adapters.cli.live import live_table
from fl_adapters.cli.scripts.script_command import split
from fl_adapters.job import Job
from fl_adapters.participant.kit import Kit
from fl_runtime.errors import ConfigError
from fl_runtime.types import Event
from fl_runtime.version import VERSION

OURS = {"--sites": True, "--rounds": True, "--json": False, "-m": False, "--help": False}


@pytest.fixture(autouse=True)
def _outside_a_federation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "ours", "script", "rest"),
    [
        ("train.py --sites 3", "--sites 3", "train.py", ""),
        ("train.py --lr 0.1 --sites 3", "--sites 3", "train.py", "--lr 0.1"),
        ("--sites 3 train.py --lr 0.1", "--sites 3", "train.py", "--lr 0.1"),
        ("--sites=3 train.py --lr=0.1 data", "--sites=3", "train.py", "--lr=0.1 data"),
        ("train.py -- --sites 3", "", "train.py", "--sites 3"),
        ("train.py --json -- --json -- x", "--json", "train.py", "--json -- x"),
        ("-m pkg.train -lm 5", "-m", "pkg.train", "-lm 5"),
        ("--lr 0.1 train.py", "--lr", "0.1", "train.py"),  # an error: --lr is not ours, and no script came before it
        ("--sites 2 -- --lr 1", "--sites 2", None, "--lr 1"),  # the script is the job file's
        ("train.py --rounds", "--rounds", None, ""),  # an error: --rounds has no value
    ],
)
def test_our_options_are_told_from_the_scripts(line: str, ours: str, script: str | None, rest: str) -> None:
    found = split(line.split(), OURS)
    assert (found.ours, found.script, found.rest) == (ours.split(), script, rest.split())


def test_options_that_go_to_the_script_are_listed_and_one_that_resembles_ours_is_doubted(invoke: Any) -> None:
    assert split("train.py --round 3 --lr 1 -v -1 -- --x".split(), OURS).options == ["--round", "--lr", "-v"]
    found = invoke("simulate", "none.py", "--round", "3", "--lr=1", "--best-metrik", "auc", "--sites", "2")
    (note,) = [line for line in found.stderr.splitlines() if line.startswith("note:")]
    assert note.startswith("note: passed to none.py: --round (did you mean --rounds?), --lr, --best-metrik")
    assert "note:" not in invoke("simulate", "none.py", "--sites", "2", "--", "--round", "3").stderr, "it was said"


def test_unknown_names_come_with_a_suggestion() -> None:
    for given, suggested in [
        ({"strategy": "fedprx"}, "fedprox"),
        ({"strategy": "fedprox:weight=equal"}, "weights"),
        ({"filters": [{"name": "quantise", "to": "int8"}]}, "Quantize"),
        ({"filters": [{"name": "GaussianDP", "clipp": 1.0}]}, "clip"),
        ({"round": 3}, "rounds"),
    ]:
        with pytest.raises(ConfigError) as caught:
            Job(app="train.py", **given)
        assert caught.value.fix.startswith(f"did you mean {suggested}? "), (given, caught.value.fix)
    with pytest.raises(ConfigError) as caught:
        Job(app="train.py", strategy="zzz")
    assert caught.value.fix.startswith("use one of: ")


@dataclass(frozen=True)
class Done:
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run `fl-adapters ARGS` in this process."""

    def call(*args: str) -> Done:
        with pytest.raises(SystemExit) as end:
            app(list(args), prog_name="fl-adapters")
        code = end.value.code
        return Done(code if isinstance(code, int) else 1 if code else 0, *capsys.readouterr())

    return call


@pytest.mark.parametrize("command", ["simulate", "doctor"])
def test_every_command_has_help_with_an_example_and_json(invoke: Any, command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"fl-adapters {command}" in result.stdout.partition("Examples:")[2]
    assert "--json" in result.stdout


def test_wrong_usage_is_exit_status_2(invoke: Any) -> None:
    assert invoke("simulate", "--lr", "0.1", "train.py").exit_code == 2
    assert invoke("simulate", "train.py", "--rounds").exit_code == 2
    assert invoke("simulate", "train.py", "--rounds", "few").exit_code == 2
    assert invoke("frobnicate").exit_code == 2


def test_nothing_to_run_is_said_with_what_to_do(invoke: Any) -> None:
    result = invoke("simulate", "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "config"
    assert "--job" in error["fix"]
    assert "to do:" in result.stderr


def test_a_script_that_is_not_there(invoke: Any) -> None:
    result = invoke("simulate", "none.py")
    assert result.exit_code == 1
    assert "there is no script none.py" in result.stderr


def test_a_script_without_an_adapter_is_told_before_its_sites_start(invoke: Any) -> None:
    Path("train.py").write_text("raise SystemExit\nfrom transformers import Trainer")
    result = invoke("simulate", "train.py", "--sites", "2", "--rounds", "1", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["what"].endswith("without exchanging anything with the server")
    told, _, rest = result.stderr.partition("error: ")
    assert "warning: train.py may train alone: it uses transformers" in " ".join(told.split())
    assert "FederatedCallback" in told and "warning" not in rest


@pytest.mark.parametrize("command", ["server", "run", "status", "cert request"])
def test_the_kit_is_named_by_the_environment_too(invoke: Any, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(*command.split()).exit_code == 2
    monkeypatch.setenv("FL_ADAPTERS_KIT", "nowhere")
    result = invoke(*command.split())
    assert result.exit_code == 1
    assert "nowhere" in result.stderr and "to do:" in result.stderr


def test_the_command_line_starts_light() -> None:
    heavy = "('grpc', 'numpy', 'torch')"
    code = f"import sys, fl_adapters.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(invoke: Any) -> None:
    result = invoke("--version")
    assert result.stdout.strip() == f"fl-adapters {VERSION}"


# -- doctor -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checks(invoke: Callable[..., Done]) -> Callable[..., tuple[int, dict[str, dict[str, str]]]]:
    """Run `doctor`; return its exit status, and its findings by name."""

    def call(*args: str) -> tuple[int, dict[str, dict[str, str]]]:
        result = invoke("doctor", "--json", *args)
        found = json.loads(result.stdout)
        assert found["ok"] == (result.exit_code == 0)
        return result.exit_code, {check["name"]: check for check in found["checks"]}

    return call


def test_doctor_finds_nothing_wrong_here(checks: Any) -> None:
    status, found = checks()
    assert status == 0, found
    assert found["gRPC on the loopback"]["status"] == "ok"
    assert {"python", "platform", "disk", "open files", "startup kit"} <= found.keys()


def test_doctor_says_which_extras_need_a_package_that_is_not_installed(
    checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = ["ours>=1", *(f"theirs>=2; extra == '{extra}'" for extra in ("hf", "torch", "dev")), "other; extra == 'he'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needs)
    status, found = checks()
    assert status == 1
    assert found["ours"]["fix"] == "pip install 'ours>=1'"
    assert found["theirs"]["detail"] == "not installed; needed by [hf], [torch]"
    assert found["other"]["detail"] == "not installed; only [he] needs it"


def test_doctor_names_a_taken_port(checks: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, found = checks("--port", port)
    assert status == 1
    assert found[f"port {port}"]["status"] == "problem"
    assert found[f"port {port}"]["fix"]


def test_doctor_looks_at_the_kit(checks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_ADAPTERS_KIT", str(tmp_path / "none"))
    status, found = checks()
    assert status == 1
    assert "no startup kit" in found["startup kit"]["detail"]

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        Kit(job="j", site="north", index=0, count=1, server=address, token="t").save(tmp_path / "kit")
        monkeypatch.setenv("FL_ADAPTERS_KIT", str(tmp_path / "kit"))
        status, found = checks()
        assert status == 0
        assert "north of j" in found["startup kit"]["detail"]
    status, found = checks()
    assert status == 1
    assert "no connection" in found["startup kit"]["detail"]


def test_brackets_in_a_text_are_shown(invoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As markup, `[xgboost]` would not be printed, and a path like this one would end in a traceback."""
    folder = tmp_path / "a[" / "b]"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "300")
    result = invoke("doctor")
    assert result.exit_code == 0, result.stderr
    assert "a[/b]" in result.stdout


def test_doctor_tells_old_from_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"numpy": "1.9.3", "grpcio": "1.85.1", "torch": "2.13.0+cpu", "fl-adapters": "0.1.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise doctor.metadata.PackageNotFoundError(name)
        return versions[name]

    wanted = ["numpy>=1.26", "grpcio>=1.62", "xxhash>=3", "torch>=2.4; extra == 'hf'", 'trl; extra == "x"']
    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    found = {check.name: check for check in doctor._packages()}

    assert (found["numpy"].status, found["numpy"].fix) == ("problem", "pip install 'numpy>=1.26'")
    assert found["grpcio"].status == found["torch"].status == found["trl"].status == "ok"
    assert (found["xxhash"].status, found["xxhash"].detail) == ("problem", "missing")
    assert "not installed" in found["trl"].detail


# -- the live table ---------------------------------------------------------------------------------------------------


def test_the_live_table_follows_the_run() -> None:
    from rich.console import Console

    def event(kind: str, round: int = 0, site: str = "", **data: Any) -> Event:
        return Event(kind, 0.0, round, site, data)

    console = Console(record=True, width=120, force_terminal=True)
    with live_table(console) as listener:
        for item in [
            event("starting", job="j", folder="runs/j", sites=("a", "b"), command="python x.py"),
            event("joined", site="a", attempt=1, version="1"),
            event("started", rounds=4, sites=["a"], tensors=1, bytes=1),
            event("round_started", 1, sites=["a"]),
            event("task_sent", 1, "a", bytes=2_000_000),
            event(
                "update",
                1,
                "a",
                status="used",
                num_examples=1234,
                local_steps=1,
                metrics={"train_loss": 0.51},
                bytes_up=3_000_000,
                bytes_down=2_000_000,
                seconds=1.5,
            ),
            event("exited", site="b", clean=False, status="exit status 1", log="b/log.txt", tail=["ValueError: no"]),
        ]:
            listener(item)
    shown = console.export_text()
    for text in (
        "round 1/4",
        "waiting",
        "0.51",
        "1,234",
        "2.0 MB",
        "3.0 MB",
        "exit status 1",
        "ValueError: no",
        "runs/j",
    ):
        assert text in shown, text


def test_the_live_table_shows_many_sites_by_their_states() -> None:
    from rich.console import Console

    names = [f"site-{number}" for number in range(1, 101)]
    facts = {"num_examples": 10, "local_steps": 1, "bytes_up": 1000, "bytes_down": 1000, "seconds": 0.5}
    console = Console(record=True, width=120, force_terminal=True)
    with live_table(console) as listener:
        listener(Event("starting", 0.0, data={"job": "j", "folder": "runs/j", "sites": names, "command": ""}))
        listener(Event("started", 0.0, data={"rounds": 4, "sites": names, "tensors": 1, "bytes": 1}))
        listener(Event("round_started", 0.0, 1, data={"sites": names}))
        for number, name in enumerate(names[:60]):
            listener(Event("task_sent", 0.0, 1, name, {"bytes": 1000}))
            loss = {"train_loss": float(number % 2)}
            if number < 40:
                listener(Event("update", 0.0, 1, name, {"status": "used", "metrics": loss, **facts}))
    shown = console.export_text()
    rows = [line.split() for line in shown.splitlines() if " sites " in line][-3:]
    assert [row[:3] for row in rows] == [
        ["40", "sites", "starting"],
        ["20", "sites", "training"],
        ["40", "sites", "waiting"],
    ]
    assert rows[-1][4:6] == ["0.5", "400"]


FEDERATION = ("provision", "unpack", "server", "run", "status", "audit verify")
FEDERATION += tuple(
    f"job {name}"
    for name in ("submit", "list", "show", "follow", "logs", "abort", "resume", "download", "compare", "delete")
)
FEDERATION += tuple(f"cert {name}" for name in ("request", "sign", "install", "renew", "revoke", "list"))


@pytest.mark.parametrize("command", FEDERATION)
def test_every_command_of_a_federation_has_help_with_an_example_and_json(command: str) -> None:
    done = CliRunner().invoke(app, [*command.split(), "--help"])
    assert done.exit_code == 0
    assert f"  fl-adapters {command} " in done.stdout.split("Examples:")[1]
    assert "--json" in done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "provision nowhere.yml",
        "unpack nowhere.zip",
        "server --kit nowhere",
        "run --kit nowhere -- true",
        "status --kit nowhere",
        "audit verify nowhere",
        "cert request --kit nowhere",
        "cert sign nowhere.pem --authority nowhere",
        "cert install nowhere.pem --kit nowhere",
        "cert renew --authority nowhere",
        "cert revoke north --authority nowhere",
        "cert crl --authority nowhere",
        "cert list --authority nowhere",
    ],
)
def test_what_is_not_there_is_an_error_with_what_to_do(line: str) -> None:
    words, _, rest = line.partition(" -- ")
    done = CliRunner().invoke(app, [*words.split(), "--json", *(["--", rest] if rest else [])])
    assert done.exit_code == 1
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert "nowhere" in error["what"] + error["where"]
    assert error["fix"]
