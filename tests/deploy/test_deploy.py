"""The files of deploy/: each by its own linter, with the commands in them, and what can run here run."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from study import Study

from fl_adapters.cli.app import app
from fl_adapters.environments.processes import free_ports
from fl_runtime.client.control import ControlClient

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
SLURM = DEPLOY / "slurm" / "fl-adapters-site.sbatch"
CHART = DEPLOY / "helm" / "fl-adapters"
_WAIT_S = 60
_PR_SET_MDWE, _PR_GET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN = 65, 66, 1


def tool(name: str) -> str:
    """The path of a linter, beside this Python or on the search path. Skips the test where there is none."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=_WAIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_command(words: Sequence[str]) -> None:
    """Check that `fl-adapters` takes these arguments. Raises click's own errors."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    context = command.make_context("fl-adapters", rest)
    name, sub, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    sub.make_context(name, rest, parent=context)


# -- systemd -----------------------------------------------------------------------------------------------------


def exec_start(unit: Path) -> list[str]:
    (line,) = [line for line in unit.read_text().splitlines() if line.startswith("ExecStart=")]
    return shlex.split(line.partition("=")[2])


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_is_valid_and_shut_off(unit: Path, tmp_path: Path) -> None:
    check_command(exec_start(unit)[1:])
    analyze = tool("systemd-analyze")
    copy = tmp_path / unit.name  # whose program exists, as verify wants it
    copy.write_text(unit.read_text().replace(exec_start(unit)[0], sys.executable))
    subprocess.run([analyze, "verify", str(copy)], capture_output=True, text=True, timeout=_WAIT_S, check=True)
    run(analyze, "security", "--offline=true", "--threshold=20", unit)  # an exposure of at most 2.0 of 10


@pytest.mark.skipif(sys.platform != "linux", reason="MemoryDenyWriteExecute is Linux's")
def test_a_server_runs_without_memory_that_is_written_and_run(tmp_path: Path) -> None:
    """As its unit has it. Native code of a dependency that makes code at run time would fail."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_GET_MDWE, 0, 0, 0, 0) < 0:
        pytest.skip("this kernel cannot refuse such memory to a process (Linux 6.3 can)")
    with Study(tmp_path) as study:
        study.server.close()
        address = f"127.0.0.1:{free_ports(1)[0]}"
        words = ["--kit", str(study.kits / "server"), "--data", str(tmp_path / "data"), "--listen", address]

        def shut_off() -> None:
            libc.prctl(_PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0)

        process = subprocess.Popen(
            [sys.executable, "-m", "fl_adapters.cli", "server", *words],
            preexec_fn=shut_off,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            with closing(ControlClient.of_kit(study.kits / "lena", address)) as control:
                assert control.ask("Status", patience_s=_WAIT_S)["federation"] == "study"
        finally:
            process.terminate()
            _, said = process.communicate(timeout=_WAIT_S)
        assert "Error" not in said, said


# -- Slurm -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """cluster(daemon): start the batch script with `daemon` in place of fl-adapters, and a Slurm that takes notes."""
    started: list[subprocess.Popen[str]] = []

    def start(daemon: str) -> subprocess.Popen[str]:
        for name, text in (("fl-adapters", daemon), ("scontrol", 'echo "$@" > "$NOTES/requeued"')):
            (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "KIT": "kits/north", "SLURM_JOB_ID": "77", "NOTES": str(tmp_path)}
        process = subprocess.Popen(["bash", str(SLURM)], env=environment, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_batch_job_whose_time_is_up_saves_and_asks_for_another(
    cluster: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    run(tool("bash"), "-n", SLURM)
    process = cluster(
        'echo "$@" > "$NOTES/arguments"; trap \'sleep 0.2; touch "$NOTES/saved"; exit 0\' TERM\n'
        'touch "$NOTES/ready"; while true; do sleep 0.05; done'
    )
    end = time.monotonic() + _WAIT_S
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < end, "the daemon was not started"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(_WAIT_S) == 0
    assert (tmp_path / "saved").exists(), "the script waits until the daemon has saved"
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    arguments = shlex.split((tmp_path / "arguments").read_text())
    assert arguments[:3] == ["site", "--kit", "kits/north"]
    check_command(arguments)


def test_a_daemon_that_fails_ends_the_batch_job_with_its_status(
    cluster: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    assert cluster("exit 3").wait(_WAIT_S) == 3
    assert not (tmp_path / "requeued").exists()


def test_the_batch_script_is_well_written() -> None:
    run(tool("shellcheck"), SLURM)


# -- containers --------------------------------------------------------------------------------------------------


def test_the_image_is_well_written_and_has_no_root() -> None:
    file = DEPLOY / "container" / "Containerfile"
    lines = file.read_text().splitlines()
    assert "USER 10001" in lines
    (default,) = [line for line in lines if line.startswith("CMD ")]
    check_command(json.loads(default.removeprefix("CMD ")))
    run(tool("hadolint"), file)


def test_compose_services_are_shut_off_and_their_commands_exist() -> None:
    services = yaml.safe_load((DEPLOY / "compose" / "compose.yml").read_text())["services"]
    assert services.keys() == {"server", "site"}
    for service in services.values():
        assert (service["read_only"], service["cap_drop"], service["user"]) == (True, ["ALL"], "10001")
        check_command(service["command"])
        (kit,) = [volume for volume in service["volumes"] if ":/kit" in volume]
        assert kit.endswith(":ro")


@pytest.mark.parametrize("role", ["server", "site"])
def test_the_chart_makes_a_pod_that_is_shut_off(role: str) -> None:
    helm = tool("helm")
    run(helm, "lint", CHART, "--set", f"role={role}")
    made = {
        item["kind"]: item for item in yaml.safe_load_all(run(helm, "template", "x", CHART, "--set", f"role={role}"))
    }
    assert ("Service" in made) == (role == "server"), "a site opens no port"
    pod = made["StatefulSet"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    (container,) = pod["containers"]
    locked = container["securityContext"]
    assert locked["readOnlyRootFilesystem"]
    assert locked["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/kit"]["readOnly"]
    arguments = container["args"]
    check_command(arguments)
    assert arguments[1:3] == ["--kit", "/kit"]
    assert arguments[4] in [each["value"] for each in container["env"] if each["name"] == "FL_ADAPTERS_STATE"]


def test_the_chart_refuses_a_role_that_there_is_not() -> None:
    done = subprocess.run(
        [tool("helm"), "template", "x", str(CHART), "--set", "role=client"],
        capture_output=True,
        text=True,
        timeout=_WAIT_S,
        check=False,
    )
    assert done.returncode != 0
    assert 'role is "client"; it must be server or site' in done.stderr
