"""The CUDA devices that sites of a simulation get, counted within those that this process may use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fl_runtime.errors import ConfigError

VARIABLE = "CUDA_VISIBLE_DEVICES"
_ASK_S = 20.0


def count_gpus() -> int | None:
    """Count the NVIDIA GPUs of this machine, without a training framework.

    Returns:
        The number of GPUs; None if it is unknown, as for GPUs of other makers.
    """
    if program := shutil.which("nvidia-smi"):
        try:
            listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_ASK_S, check=True).stdout
        except (OSError, subprocess.SubprocessError):  # there is a driver, but no GPU that it can reach
            return 0
        return sum(line.startswith("GPU ") for line in listed.splitlines())
    if not sys.platform.startswith("linux") or Path("/dev/kfd").exists() or Path("/dev/dxg").exists():
        return None
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def visible_devices(
    gpus: Sequence[str | int],
    environment: Mapping[str, str] = os.environ,
    count: Callable[[], int | None] = count_gpus,
) -> tuple[str, ...]:
    """Find the devices that `--gpus` means.

    Args:
        gpus: Numbers of GPUs as a framework counts them in this process: 0 is the first that `CUDA_VISIBLE_DEVICES`
            names, or the first of the machine. Also identifiers such as "GPU-8932f937".
        environment: Environment variables of this process.
        count: Returns the number of GPUs of the machine, or None if it is unknown. Asked without the variable only.

    Returns:
        A value of `CUDA_VISIBLE_DEVICES` for each of `gpus`.

    Raises:
        ConfigError: There is no such GPU, or this process may not use it.
    """
    if not gpus:
        return ()
    wanted = [str(gpu).strip() for gpu in gpus]
    if VARIABLE in environment:
        visible = [device.strip() for device in environment[VARIABLE].split(",")]
        if "-1" in visible:  # CUDA ignores it and what follows
            visible = visible[: visible.index("-1")]
        return tuple(_within(gpu, [device for device in visible if device]) for gpu in wanted)
    number = count()
    missing = [gpu for gpu in wanted if gpu.isdigit() and number is not None and int(gpu) >= number]
    if missing or any(not (gpu.isdigit() or "-" in gpu[1:]) for gpu in wanted):
        raise _no_gpu(missing[0] if missing else next(g for g in wanted if not g.isdigit()), "this machine", number)
    return tuple(wanted)


def _within(gpu: str, visible: Sequence[str]) -> str:
    if gpu.isdigit():
        if int(gpu) < len(visible):
            return visible[int(gpu)]
    elif gpu in visible:
        return gpu
    raise _no_gpu(gpu, f"{VARIABLE}={','.join(visible)}", len(visible))


def _no_gpu(gpu: str, where: str, number: int | None) -> ConfigError:
    if number:
        fix = "give 0" if number == 1 else f"give numbers from 0 to {number - 1}"
        fix += f"; they count within {VARIABLE}" if where.startswith(VARIABLE) else ""
    else:
        fix = "leave --gpus out to train on the CPU" if number == 0 else "give numbers, such as --gpus 0,1"
    return ConfigError(f"there is no GPU {gpu!r}", where=where, fix=fix)
