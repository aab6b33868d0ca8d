"""Bytes of a round on the wire, counted at the socket: at most 1.02 times the tensors' bytes plus 4 KiB."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from federation_bench import Bench, at_once, registered, serving
from tcp_proxy import TcpProxy

from fl_runtime.types import Array, Arrays

ROUNDS = 6


def lora() -> Arrays:
    """Return rank-2 adapters on two projections of 12 layers: 48 tensors of 3 KB, with PEFT's long names."""
    return {
        f"base_model.model.bert.encoder.layer.{layer:02d}.attention.self.{part}.lora_{half}.default.weight": np.zeros(
            (2, 384) if half == "A" else (384, 2), np.float32
        )
        for layer in range(12)
        for part in ("query", "value")
        for half in "AB"
    }


def ia3() -> Arrays:
    """Return one vector for each of three projections in 6 layers."""
    return {
        f"base_model.model.bert.encoder.layer.{layer}.attention.self.{part}.ia3_l.default.weight": np.zeros(
            (384, 1), ml_dtypes.bfloat16
        )
        for layer in range(6)
        for part in ("key", "value", "intermediate.dense")
    }


def one_tensor(size: int) -> Arrays:
    return {"w": np.zeros(size, np.uint8)}


SETS = {
    "lora": lora(),
    "ia3": ia3(),
    "nothing but a number": {"w": np.zeros(1)},
    "just inline": one_tensor(2**20),
    "just too large for that": one_tensor(2**20 + 1),
    "8 MiB": one_tensor(8 * 2**20),
}


def noise(arrays: Arrays, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.uniform(0, 100, a.shape)).astype(a.dtype) for name, a in arrays.items()}


def counted(bench: Bench, name: str, proxy: TcpProxy, arrays: Arrays, metrics: dict[str, float]) -> list[Array]:
    """Return the bytes (up, down) of every round of a site, from one task to the next."""
    site = bench.site(name, address=proxy.address)
    site.join()
    site.register(arrays)
    task = site.start(arrays)
    marks = [np.array(proxy.counted())]
    while task.kind == "train":
        site.submit(task, noise(arrays, task.round), num_examples=1000, metrics=metrics, local_steps=50)
        task = site.client.next_task()
        marks.append(np.array(proxy.counted()))
    return list(np.diff(marks, axis=0))


@pytest.mark.parametrize("what", SETS)
def test_a_round_costs_little_more_than_its_tensors(tmp_path: Path, what: str) -> None:
    arrays = SETS[what]
    payload = sum(array.nbytes for array in arrays.values())
    metrics = {"train_loss": 0.123456789, "train_grad_norm": 1.23456789}
    with serving(tmp_path, 2, rounds=2 if payload > 2**21 else ROUNDS) as bench, ExitStack() as stack:
        proxies = {name: stack.enter_context(TcpProxy(bench.address)) for name in bench.names}
        rounds = bench.run(lambda name: counted(bench, name, proxies[name], arrays, metrics))
    limit = 1.02 * payload + 4096
    for site, costs in rounds.items():
        for number, (up, down) in enumerate(costs, 1):
            assert payload <= up <= limit, f"{site}, round {number}, up: {up} bytes for {payload}"
            assert payload <= down <= limit, f"{site}, round {number}, down: {down} bytes for {payload}"


def test_the_first_task_does_not_send_the_names_back(tmp_path: Path) -> None:
    arrays = lora()
    assert len(arrays) == 48
    payload = sum(array.nbytes for array in arrays.values())
    with serving(tmp_path, 2) as bench, TcpProxy(bench.address) as proxy:
        sites = {name: bench.site(name, address=proxy.address if name == "site-2" else "") for name in bench.names}
        registered(sites.values(), arrays)
        before = proxy.counted()[1]
        at_once(sites.values(), lambda site: site.start(arrays))
        assert payload <= proxy.counted()[1] - before <= 1.02 * payload + 4096


def test_names_travel_once_and_not_with_every_round(tmp_path: Path) -> None:
    arrays = {f"{'a long name ' * 80}{i}": np.zeros(1, np.float32) for i in range(100)}  # 97 kB of names
    with serving(tmp_path, 1, rounds=ROUNDS) as bench, TcpProxy(bench.address) as proxy:
        costs = counted(bench, "site-1", proxy, arrays, {})
    assert max(cost.max() for cost in costs) < 4096


def test_what_the_server_reports_as_bytes_is_what_passes_the_socket(tmp_path: Path) -> None:
    arrays = one_tensor(3 * 2**20)
    with serving(tmp_path, 1, rounds=2) as bench, TcpProxy(bench.address) as proxy:
        costs = counted(bench, "site-1", proxy, arrays, {})
        result = bench.server.result()
    total_up, total_down = (int(sum(cost[i] for cost in costs)) for i in (0, 1))
    assert abs(result.bytes_up - total_up) < 0.01 * total_up
    assert abs(result.bytes_down - total_down) < 0.01 * total_down
