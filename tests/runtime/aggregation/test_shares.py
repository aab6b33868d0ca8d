"""The cap on a site's share, through the real server and against NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import errors_at_once, serving, started
from numpy_rounds import EXAMPLES, STEPS, assert_same, pulled, reference, rounds_of, weights
from server_process import server_process

from fl_adapters import Job
from fl_runtime.aggregation import FLoRA, known_strategies, make_strategy
from fl_runtime.aggregation.lora.products import ENCODING
from fl_runtime.aggregation.shares import capped_weights, fewest_sites, within_cap
from fl_runtime.errors import ConfigError, RoundFailedError
from fl_runtime.types import Array, Arrays, ServerState, Task, Update

CAP = 0.4
N = np.array(EXAMPLES[:3], float)


def limited(weights: Array, cap: float) -> Array:
    """Water-filling by bisection: the highest level at which nobody is above the cap, divided by the sum."""
    low, high = 0.0, float(weights.max())
    if high > cap * weights.sum():
        for _ in range(200):
            level = (low + high) / 2
            fits = level <= cap * np.minimum(weights, level).sum() * (1 + 1e-13)
            low, high = (level, high) if fits else (low, level)
    shares = np.minimum(weights, high)
    return np.asarray(shares / shares.sum())


@pytest.mark.parametrize("cap", [0.2, 0.25, 1 / 3, 0.4, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("sites", [5, 6, 12])
def test_shares_are_those_of_the_highest_level_that_fits(cap: float, sites: int) -> None:
    draw = np.random.default_rng([sites, int(cap * 100)])
    for _ in range(50):
        before = 10.0 ** draw.uniform(0, draw.choice([1, 4, 15]), sites)
        after = np.array(list(capped_weights({f"s{i}": w for i, w in enumerate(before)}, cap).values()))
        np.testing.assert_allclose(after / after.sum(), limited(before, cap), rtol=1e-9)
        assert (after / after.sum()).max() <= cap * (1 + 1e-12)
        assert (after <= before).all()
        within = after < before  # those above the cap have exactly the cap, the others stay as they are
        np.testing.assert_allclose(after[within] / after.sum(), cap, rtol=1e-12)


def test_the_order_of_the_sites_does_not_change_a_bit() -> None:
    before = {f"s{i}": w for i, w in enumerate(10.0 ** np.random.default_rng(0).uniform(0, 6, 9))}
    after = capped_weights(before, 0.2)
    assert all(capped_weights(dict(sorted(before.items(), key=key)), 0.2) == after for key in (str, lambda i: i[1]))


def test_what_cannot_hold_fails() -> None:
    with pytest.raises(RoundFailedError, match="at least 3 sites"):
        capped_weights({"a": 1.0, "b": 1.0}, 0.4)
    with pytest.raises(RoundFailedError, match="too large"):
        capped_weights({"a": 1e308, "b": 1e308, "c": 1.0}, 0.4)
    assert [fewest_sites(cap) for cap in (None, 1, 0.5, 0.49, 1 / 3, 0.3)] == [1, 1, 2, 3, 3, 4]


# -- through the server ------------------------------------------------------------------------------------------


def mean(shares: Array, parts: list[Array]) -> Array:
    return np.asarray(np.tensordot(shares, np.array(parts), 1))


def momentum(shares: Array) -> Any:
    def step(x: Array, parts: list[Array], number: int, memory: dict[str, Any]) -> Array:
        memory["m"] = 0.9 * memory.get("m", 0.0) + mean(shares, parts) - x
        return np.asarray(x + memory["m"])

    return step


def normalised(shares: Array) -> Any:
    steps = np.array(STEPS[:3], float)

    def step(x: Array, parts: list[Array], number: int, memory: dict[str, Any]) -> Array:
        changes = [(part - x) / a for part, a in zip(parts, steps, strict=True)]
        return np.asarray(x + (shares @ steps) * mean(shares, changes))

    return step


def plain(shares: Array) -> Any:
    return lambda x, parts, number, memory: mean(shares, parts)


FACTORS = {"site-1": 9.0, "site-2": 1.0, "site-3": 2.0}


@pytest.mark.parametrize(
    ("spec", "oracle", "raw", "fields"),
    [
        ("fedavg", plain, N, {}),
        ("fedavg", plain, N * [9, 1, 2], {"site_weights": FACTORS}),
        ("fedavg:weights=equal", plain, np.array([9.0, 1, 2]), {"site_weights": FACTORS}),
        ("norm-bounding:bound=1e9,weights=examples", plain, N, {}),
        ("fedavgm", momentum, N, {}),
        ("fednova", normalised, N, {}),
    ],
)
def test_every_weighted_strategy_keeps_to_the_cap(
    tmp_path: Path, spec: str, oracle: Any, raw: Array, fields: dict[str, Any]
) -> None:
    assert raw.max() / raw.sum() > CAP
    found = rounds_of(tmp_path, spec, weights(), max_share=CAP, **fields)
    assert_same(found, reference(weights(), oracle(limited(raw, CAP))))


def test_without_a_site_above_the_cap_no_bit_changes(tmp_path: Path) -> None:
    capped = rounds_of(tmp_path / "capped", "fedavg", weights(), max_share=0.7)
    free = rounds_of(tmp_path / "free", "fedavg", weights())
    for one, other in zip(capped, free, strict=True):
        assert {name: array.tobytes() for name, array in one.items()} == {n: a.tobytes() for n, a in other.items()}


def test_a_tensor_that_a_site_holds_back_counts_there_with_its_global_value(tmp_path: Path) -> None:
    """Else the share of the others in this tensor would be above the cap."""
    shares = limited(N, CAP)
    found = rounds_of(tmp_path, "fedavg", weights(), max_share=CAP, held_back={1: ["layer.bias"]})

    def oracle(x: Array, parts: list[Array], number: int, memory: dict[str, Any]) -> Array:
        return mean(shares, [parts[0], x if x.ndim == 1 else parts[1], parts[2]])

    assert_same(found, reference(weights(), oracle))


def test_who_is_scaled_down_is_named_once(tmp_path: Path) -> None:
    with serving(tmp_path, 3, sockets=False, rounds=3, max_share=CAP) as bench:

        def work(name: str) -> Arrays:
            examples = EXAMPLES[bench.names.index(name)]
            return bench.site(name).take_part({"w": np.zeros(2)}, lambda task: {"w": task.arrays["w"] + 1}, examples)

        bench.run(work)
        (warning,) = bench.watch.all("warning", "site-3")
        assert warning.data["text"] == (
            "site-3 would have a share of 0.636 in the model of round 1; it is scaled down to max_share=0.4, here and "
            "in later rounds"
        )
        assert len([event for event in bench.watch.all("warning") if "max_share" in event.data["text"]]) == 1


def test_the_same_bits_whatever_the_order_of_arrival_and_when_the_server_is_killed(tmp_path: Path) -> None:
    def work(task: Task, index: int) -> Arrays:
        return {name: pulled(index, task.round, array) for name, array in task.arrays.items()}

    def model(folder: Path, order: tuple[int, ...], *, killed: bool) -> dict[str, bytes]:
        with server_process(folder, 3, rounds=1, max_share=CAP) as server:
            sites = [server.site(f"site-{i}") for i in (1, 2, 3)]
            tasks = started(sites, weights())
            for count, index in enumerate(order):
                assert sites[index].submit(tasks[f"site-{index + 1}"], work(tasks["site-1"], index), EXAMPLES[index])
                if killed and count < 2:
                    server.kill()
                    server.start()
            for site in sites:
                site.client.next_task()
                site.client.leave("done", early=False)
                site.vanish()
            return {name: array.tobytes() for name, array in server.finished().items()}

    expected = model(tmp_path / "in order", (0, 1, 2), killed=False)
    assert model(tmp_path / "backwards", (2, 1, 0), killed=False) == expected
    assert model(tmp_path / "killed", (1, 2, 0), killed=True) == expected


@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_all_updates_of_a_site_in_a_buffer_count_together(tmp_path: Path, weighting: str) -> None:
    """Site 1 fills half of the buffer of four; with the cap it has 0.4 of the step."""
    spec = f"fedbuff:k=4,staleness=0,weights={weighting}"
    with serving(tmp_path, 3, sockets=False, rounds=2, strategy=spec, max_share=CAP) as bench:
        sites = [bench.site(name) for name in bench.names]
        tasks = started(sites, {"w": np.zeros(1), "v": np.zeros(1)})
        values = [1.0, 10.0, 100.0]
        for index in (0, 0, 1, 2):
            task = tasks[bench.names[index]]
            sites[index].submit(task, {"w": np.full(1, values[index]), "v": np.ones(1)}, EXAMPLES[index])
            if index == 0 and task.round == 1:
                tasks["site-1"] = sites[0].client.next_task()
        bench.watch.wait("round_finished")
        raw = np.array([2.0, 1, 1]) if weighting == "equal" else N * [2, 1, 1]
        found = sites[1].client.next_task().arrays["w"]
        np.testing.assert_allclose(found, limited(raw, CAP) @ values, rtol=1e-12)
        for site in sites:
            site.client.leave("enough", early=False)


def test_swarm_has_the_bits_of_fedavg_under_a_cap(tmp_path: Path) -> None:
    from fl_adapters.testing import LocalFederation, Place

    def loop(place: Place) -> Arrays:
        import fl_adapters as fl

        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=weights()):
                arrays = {name: pulled(place.index, task.round, array) for name, array in task.arrays.items()}
                task.submit(arrays, num_examples=EXAMPLES[place.index])
            return site.arrays

    def model(strategy: str) -> dict[str, bytes]:
        with LocalFederation(sites=3, rounds=3, strategy=strategy, max_share=CAP) as federation:
            finals = federation.run(loop)
        return {name: array.tobytes() for name, array in finals["site-1"].items()}

    assert model("swarm") == model("fedavg")


# -- strategies that need no server ------------------------------------------------------------------------------


def test_products_of_factors_are_summed_with_capped_shares() -> None:
    draw, strategy = np.random.default_rng(0), FLoRA()

    def pair(rank: int) -> dict[str, Array]:
        return {
            "m.lora_A.weight": draw.normal(size=(rank, 6)),
            "m.lora_B.weight": draw.normal(size=(5, rank)),
        }

    sent = [pair(rank) for rank in (1, 2, 3)]
    updates = [
        Update("job", 1, "", f"s{i}", 1, 0, arrays, n, content="encoded", encoding=ENCODING)
        for i, (arrays, n) in enumerate(zip(sent, EXAMPLES[:3], strict=True))
    ]
    base = {"m.lora_A.weight": np.eye(1, 6), "m.lora_B.weight": np.zeros((5, 1))}

    def allocate(arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
        return {name: np.empty_like(array) for name, array in arrays.items()}, {}

    aggregator = strategy.aggregator(base, allocate, {}, ServerState())
    capped, names = within_cap(updates, strategy.weights_of(updates), CAP)
    for update in capped:
        aggregator.add(update)
    model, _ = aggregator.result()
    assert names == ("s2",)
    wanted = mean(limited(N, CAP), [a["m.lora_B.weight"] @ a["m.lora_A.weight"] for a in sent])
    np.testing.assert_allclose(model["m.lora_B.weight"] @ model["m.lora_A.weight"], wanted, atol=1e-9)


# -- what cannot hold is refused before the first step -----------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"max_share": 0.4, "sites": 2}, "needs the updates of at least 3 sites in every model, but a round .* with 2"),
        ({"max_share": 0.4, "sites": 5, "min_sites": 2}, "at least 3 sites .* may close with 2"),
        ({"max_share": 0.4, "sites": 5, "fraction": 0.4}, "at least 3 sites .* may close with 2"),
        ({"max_share": 0.4, "sites": 5, "strategy": "cyclic"}, "close with 5, of which the strategy cyclic counts 1"),
        ({"max_share": 0.4, "sites": 5, "strategy": "fedbuff:k=2"}, "of which the strategy fedbuff counts 2"),
        ({"max_share": 0.4, "sites": 5, "strategy": "krum:m=2"}, "of which the strategy krum:m=2 counts 2"),
        ({"max_share": 0.4, "sites": 5, "strategy": "tree-cyclic"}, "of which the strategy tree-cyclic counts 1"),
        ({"max_share": 0.4, "sites": 5, "strategy": "tree-histogram"}, "sums over the rows of all sites"),
        ({"max_share": 0.0}, "max_share cannot be 0.0"),
        ({"max_share": 1.5}, "max_share cannot be 1.5"),
    ],
)
def test_a_cap_that_cannot_hold_is_refused_when_the_job_is_made(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Job(app="train.py", **fields).settings([f"site-{i}" for i in range(1, fields.get("sites", 3) + 1)])


def test_a_cap_that_cannot_hold_is_refused_at_the_handshake(tmp_path: Path) -> None:
    with serving(tmp_path, 3, sockets=False, max_share=CAP, min_sites=2) as bench:
        sites = [bench.site(name) for name in bench.names]
        for site in sites:
            site.join()
        errors = errors_at_once(sites, lambda site: site.register({"w": np.zeros(2)}))
    assert all(isinstance(error, ConfigError) and "max_share=0.4" in str(error) for error in errors)


@pytest.mark.parametrize("name", known_strategies())
def test_every_strategy_says_how_it_counts(name: str) -> None:
    """A strategy whose models are made of fewer updates, or whose weights cannot be scaled, cannot hide it."""
    strategy = make_strategy(name)
    few = {"cyclic": 1, "krum": 1, "tree-cyclic": 1, "fedbuff": 2}
    assert strategy.cohort(5) == few.get(name, 5) and strategy.cohort(1) == 1
    assert strategy.scalable == (name not in ("tree-histogram", "sum"))
