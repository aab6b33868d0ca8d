"""Sites on the server's machine: large payloads stay in files that both sides map, and nothing else changes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from federation_bench import Bench, serving
from tcp_proxy import TcpProxy

from fl_runtime.errors import FederationError
from fl_runtime.transport.shared import SharedFolder
from fl_runtime.types import Array, Arrays, Task

ROUNDS = 5
LARGE: Arrays = {
    "w": np.random.default_rng(0).normal(size=(700, 1001)).astype(np.float32),
    "b": np.random.default_rng(1).normal(size=3),
    "n": np.array(7),
}


def trained(name: str, task: Task) -> Arrays:
    """Return weights that differ for every site and round."""
    draw = np.random.default_rng([int(name[-1]), task.round])
    return {
        key: np.asarray(array + draw.normal(size=array.shape)).astype(array.dtype) for key, array in task.arrays.items()
    }


def averaged(sites: int) -> Arrays:
    """Compute the same rounds in a plain loop in float64."""
    model: dict[str, Array] = dict(LARGE)
    for number in range(1, ROUNDS + 1):
        task = Task(job="", round=number, stage="", kind="train", version=0, arrays=model, extras={}, config={})
        all_of = [trained(f"site-{i}", task) for i in range(1, sites + 1)]
        model = {
            key: np.mean([one[key] for one in all_of], 0).astype(array.dtype)
            if array.dtype.kind == "f"
            else np.max([one[key] for one in all_of], 0)
            for key, array in model.items()
        }
    return model


def final(bench: Bench, proxies: dict[str, TcpProxy], same_machine: bool) -> dict[str, Arrays]:
    def site(name: str) -> Arrays:
        one = bench.site(name, address=proxies[name].address, same_machine=same_machine)
        return one.take_part(LARGE, lambda task: trained(name, task))

    return bench.run(site)


def run(folder: Path, *, share: bool, same_machine: bool) -> tuple[Arrays, int, int]:
    """Return the final weights, the bytes that the server reports, and the bytes that passed the sockets."""
    with serving(folder, 2, rounds=ROUNDS, share=share) as bench, ExitStack() as stack:
        proxies = {name: stack.enter_context(TcpProxy(bench.address)) for name in bench.names}
        models = final(bench, proxies, same_machine)
        assert all(models["site-1"][k].tobytes() == models["site-2"][k].tobytes() for k in LARGE)
        result = bench.server.result()
        return models["site-1"], result.bytes_up + result.bytes_down, sum(sum(p.counted()) for p in proxies.values())


def test_the_same_bits_and_no_tensor_crosses_a_socket(tmp_path: Path) -> None:
    model, said, passed = run(tmp_path / "shared", share=True, same_machine=True)
    other, said_by_other, passed_by_other = run(tmp_path / "sent", share=False, same_machine=True)
    expected = averaged(2)
    for key, array in model.items():
        assert array.tobytes() == other[key].tobytes(), key
        np.testing.assert_allclose(array, expected[key], rtol=1e-5, atol=1e-5)
    assert passed < 64_000
    assert passed_by_other > 2 * 2 * ROUNDS * 700 * 1001 * 4
    assert abs(said - said_by_other) < 0.01 * said_by_other  # what a run would cost over the wire stays visible


def test_a_site_that_does_not_say_that_it_is_on_the_same_machine_gets_frames(tmp_path: Path) -> None:
    model, _, passed = run(tmp_path, share=True, same_machine=False)
    assert passed > 2 * 2 * ROUNDS * 700 * 1001 * 4
    np.testing.assert_allclose(model["w"], averaged(2)["w"], rtol=1e-5, atol=1e-5)


def test_a_site_that_dies_while_it_reads_leaves_the_model_to_others(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=ROUNDS, share=True, min_sites=1, rejoin_s=2.0) as bench:
        sites = {name: bench.site(name, same_machine=True) for name in bench.names}
        for site in sites.values():
            site.join()
        bench.run(lambda name: sites[name].register(LARGE))
        tasks = bench.run(lambda name: sites[name].start(LARGE))
        sites["site-2"].vanish()
        again = bench.site("site-2", same_machine=True)
        again.join()
        again.register(LARGE)
        task = again.client.next_task()
        assert task.round == 1 and task.arrays["w"].tobytes() == tasks["site-1"].arrays["w"].tobytes()
        for number in range(1, ROUNDS + 1):
            for site in (sites["site-1"], again):
                assert site.submit(task, {k: np.full_like(a, number) for k, a in LARGE.items()}) == "used"
            task, _ = bench.run(lambda name: (again if name == "site-2" else sites[name]).client.next_task()).values()
            np.testing.assert_array_equal(task.arrays["w"], np.float32(number))


def test_an_update_with_nan_in_a_file_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, 1, rounds=1, share=True) as bench:
        site = bench.site("site-1", same_machine=True)
        site.join()
        site.register(LARGE)
        task = site.start(LARGE)
        spoilt = {**LARGE, "w": LARGE["w"].copy()}
        spoilt["w"][-1, -1] = np.nan
        with pytest.raises(FederationError, match="NaN or infinite values in w"):
            site.submit(task, spoilt)


def test_files_outside_the_folder_cannot_be_named(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_bytes(bytes(64))
    (tmp_path / "inside" / "short").write_bytes(bytes(8))
    shared = SharedFolder(tmp_path / "inside")
    for name, what in (
        ("../secret", "is not a file name in the shared folder"),
        ("short", "has 8 bytes"),
        ("x", "cannot be opened"),
    ):
        with pytest.raises(FederationError, match=what):
            shared.payload(name, 32)


def test_a_mapping_is_found_again_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(64))
    shared = SharedFolder(tmp_path)
    first = shared.payload("a", 16)
    (tmp_path / "a").rename(tmp_path / "b")
    shared.payload("b", 16)[:] = 3
    assert first.tolist() == [3] * 16
    assert np.shares_memory(shared.payload("b", 64), first)
