"""Distributed training within one site: only rank 0 talks to the federation, and shares what it receives.

`on_rank_zero`, `share` and `share_arrays` are collectives of the default process group: all ranks make the same calls
in the same order. With one rank, or without a process group, they are plain calls.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from fl_adapters.torch.state import Specs, as_tensor, specs_of
from fl_runtime.errors import FederationError
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.dtypes import dtype_of

T = TypeVar("T")
Functions = Mapping[str, Callable[[Any], Any]]
"""Name -> collective function of one argument, which is rank 0's there and None on the other ranks."""
Call = Callable[[str, Any], Any]
"""call(name, argument): call one of the `Functions` on every rank, and return rank 0's result."""

_WAITING, _DONE, _FAILED, _CALL = 0, 1, 2, 3
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
    return on_rank_zero_with({}, lambda _call: work())


def on_rank_zero_with(functions: Functions, work: Callable[[Call], T]) -> T | None:
    """Call a function on rank 0 only, which may have all ranks call others meanwhile; else as `on_rank_zero`.

    Args:
        functions: Collective functions, of the same names on every rank. They run in the threads that train. If one
            of them fails on any rank, `call` raises on rank 0, which decides what follows.
        work: The function. It gets `call`.

    Returns:
        Its result on rank 0, None on the other ranks.

    Raises:
        FederationError: The function failed on rank 0.
    """
    if not several():
        return work(lambda name, argument: functions[name](argument))
    if dist.get_rank() == 0:
        return _run_on_rank_zero(functions, work)
    while (flag := int(_broadcast(torch.tensor([_WAITING])))) in (_WAITING, _CALL):
        if flag == _CALL:
            _answer(functions, share(None), None)
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


def share_arrays(
    arrays: Arrays | None, scattered: Callable[[str, tuple[int, ...]], bool] = lambda name, shape: False
) -> tuple[Specs, Iterator[tuple[str, Array | None]]]:
    """Give every rank the arrays of rank 0, one at a time. Collective.

    Args:
        arrays: Name -> array of any dtype on rank 0; ignored on the other ranks.
        scattered: scattered(name, shape): whether only rank 0 gets an array, because the caller scatters it.

    Returns:
        The shapes and dtypes of the arrays, and an iterator over (name, array). The iterator is collective as well:
        every rank must use it up, or no rank may start it. It yields rank 0's own arrays there, and on the other ranks
        new ones, or None in place of those that are scattered.
    """
    if not several():
        assert arrays is not None
        return specs_of(arrays), iter(arrays.items())
    rows = share([[n, list(shape), dtype] for n, (shape, dtype) in specs_of(arrays or {}).items()])
    specs = {name: (tuple(shape), dtype) for name, shape, dtype in rows}
    return specs, _arrays_one_by_one(specs, arrays, scattered)


def _arrays_one_by_one(
    specs: Specs, arrays: Arrays | None, scattered: Callable[[str, tuple[int, ...]], bool]
) -> Iterator[tuple[str, Array | None]]:
    for name, (shape, dtype) in specs.items():
        own = arrays[name] if arrays is not None and is_rank_zero() else None
        yield name, own if scattered(name, shape) else _shared(own, shape, dtype)


def _shared(own: Array | None, shape: tuple[int, ...], dtype: str) -> Array:
    """Give every rank one array of rank 0."""
    array = np.empty(shape, dtype=dtype_of(dtype)) if own is None else own
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if not flat.size:
        return array
    received = _broadcast(as_tensor(flat))
    return received.cpu().numpy().view(array.dtype).reshape(shape) if own is None else own


def _run_on_rank_zero(functions: Functions, work: Callable[[Call], T]) -> T:
    outcome: list[T] = []
    requests: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
    replies: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    failure: list[BaseException] = []
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def call(name: str, argument: Any) -> Any:
        requests.put((name, argument))
        result, error = replies.get()
        if error is not None:
            raise error
        return result

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # every thread has its own current device
            outcome.append(work(call))
        except BaseException as error:  # the main thread raises it
            failure.append(error)
        finally:
            requests.put(None)

    thread = threading.Thread(target=run, name="fl-adapters-rank-zero", daemon=True)
    thread.start()
    silence_s = min(_LONGEST_SILENCE_S, _timeout_s() / 5)
    while True:
        try:
            request = requests.get(timeout=silence_s)
        except queue.Empty:
            _broadcast(torch.tensor([_WAITING]))
            continue
        if request is None:
            break
        _broadcast(torch.tensor([_CALL]))
        share(request[0])
        replies.put(_answer(functions, *request))
    thread.join()
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


def _answer(functions: Functions, name: str, argument: Any) -> tuple[Any, Exception | None]:
    """Call a collective function; return its result, and the error if it failed on any rank. Collective."""
    result, error = None, None
    try:
        result = functions[name](argument)
    except Exception as failure:  # rank 0's thread that asked raises it
        error = failure
        if not (is_rank_zero() or isinstance(failure, FederationError)):
            print(f"fl-adapters: {name} failed on rank {dist.get_rank()}: {failure!r}", file=sys.stderr, flush=True)
    failed = torch.tensor([error is not None], dtype=torch.int64, device=_device())
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if error is None and int(failed):
        error = FederationError(f"{name} failed on another rank of this site", where="see that rank's output")
    return result, error


def _broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Return rank 0's tensor on every rank, on a device that the process group's backend can reach."""
    tensor = tensor.to(_device())
    dist.broadcast(tensor, src=0)
    return tensor


def _device() -> torch.device:
    """A device that the process group's backend can reach."""
    if "gloo" in str(dist.get_backend_config()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _timeout_s() -> float:
    """Return the default process group's timeout; torch's default of half an hour if it cannot be read."""
    group: Any = dist.group.WORLD
    try:
        options = group._get_backend(torch.device("cpu")).options
        return float(options._timeout.total_seconds())
    except (AttributeError, RuntimeError):
        return 1800.0
