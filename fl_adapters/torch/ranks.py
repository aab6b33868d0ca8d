"""Distributed training within one site: only rank 0 talks to the federation, and shares what it receives.

`on_rank_zero`, `share` and `share_arrays` are collectives of the default process group: all ranks make the same calls
in the same order. With one rank, or without a process group, they are plain calls.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from fl_adapters.torch.state import Specs, as_tensor, specs_of
from fl_runtime.errors import FederationError
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.dtypes import dtype_of

T = TypeVar("T")
_WAITING, _DONE, _FAILED = 0, 1, 2
_LONGEST_SILENCE_S = 2.0


def several() -> bool:
    """Return whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Return the number of processes that train together at this site."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Return whether this process talks to the federation."""
    return not several() or dist.get_rank() == 0


def on_rank_zero(work: Callable[[], T]) -> T | None:
    """Call a function on rank 0 only, and wait for it on every rank.

    The function may block for much longer than the process group's timeout: it runs in a thread of its own, while
    rank 0 broadcasts to the others that they must still wait.

    Args:
        work: The function. An error in it is raised on every rank: on rank 0 as it is, on the others as a
            FederationError.

    Returns:
        Its result on rank 0, None on the other ranks.

    Raises:
        FederationError: The function failed on rank 0.
    """
    if not several():
        return work()
    if dist.get_rank() == 0:
        return _run_on_rank_zero(work)
    while (flag := int(_broadcast(torch.tensor([_WAITING])))) == _WAITING:
        pass
    if flag == _FAILED:
        raise FederationError.from_wire(share(None))
    return None


def share(value: Any) -> Any:
    """Give every rank the value of rank 0. Collective.

    Args:
        value: A JSON value on rank 0; ignored on the other ranks.

    Returns:
        Rank 0's value. With one rank, `value` itself.
    """
    if not several():
        return value
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if is_rank_zero() else None
    size = int(_broadcast(torch.tensor([0 if data is None else data.numel()])))
    data = _broadcast(torch.empty(size, dtype=torch.uint8) if data is None else data)
    return json.loads(data.cpu().numpy().tobytes())


def share_arrays(arrays: Arrays | None) -> tuple[Specs, Iterator[tuple[str, Array]]]:
    """Give every rank the arrays of rank 0, one at a time. Collective.

    Args:
        arrays: Name -> array of any dtype on rank 0; ignored on the other ranks.

    Returns:
        The shapes and dtypes of the arrays, and an iterator over (name, array). The iterator is collective as well:
        every rank must use it up, or no rank may start it. It yields rank 0's own arrays there, and new ones on the
        other ranks.
    """
    if not several():
        assert arrays is not None
        return specs_of(arrays), iter(arrays.items())
    rows = share([[n, list(shape), dtype] for n, (shape, dtype) in specs_of(arrays or {}).items()])
    specs = {name: (tuple(shape), dtype) for name, shape, dtype in rows}
    return specs, _arrays_one_by_one(specs, arrays)


def _arrays_one_by_one(specs: Specs, arrays: Arrays | None) -> Iterator[tuple[str, Array]]:
    for name, (shape, dtype) in specs.items():
        array = arrays[name] if arrays is not None and is_rank_zero() else np.empty(shape, dtype=dtype_of(dtype))
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if flat.size:
            received = _broadcast(as_tensor(flat))
            if not is_rank_zero():
                array = received.cpu().numpy().view(array.dtype).reshape(shape)
        yield name, array


def _run_on_rank_zero(work: Callable[[], T]) -> T:
    outcome: list[T] = []
    failure: list[BaseException] = []
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # every thread has its own current device
            outcome.append(work())
        except BaseException as error:  # the main thread raises it
            failure.append(error)

    thread = threading.Thread(target=run, name="fl-adapters-rank-zero", daemon=True)
    thread.start()
    silence_s = min(_LONGEST_SILENCE_S, _timeout_s() / 5)
    while True:
        thread.join(silence_s)
        if not thread.is_alive():
            break
        _broadcast(torch.tensor([_WAITING]))
    if not failure:
        _broadcast(torch.tensor([_DONE]))
        return outcome[0]
    _broadcast(torch.tensor([_FAILED]))
    error = failure[0]
    shared = error
    if not isinstance(shared, FederationError):
        shared = FederationError(f"rank 0 failed: {error!r}", where="rank 0")
    share(shared.to_wire())
    raise error


def _broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Return rank 0's tensor on every rank, on a device that the process group's backend can reach."""
    if "gloo" not in str(dist.get_backend_config()):
        tensor = tensor.to(torch.device("cuda", torch.cuda.current_device()))
    dist.broadcast(tensor, src=0)
    return tensor


def _timeout_s() -> float:
    """Return the default process group's timeout; torch's default of half an hour if it cannot be read."""
    group: Any = dist.group.WORLD
    try:
        options = group._get_backend(torch.device("cpu")).options
        return float(options._timeout.total_seconds())
    except (AttributeError, RuntimeError):
        return 1800.0
