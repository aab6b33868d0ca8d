"""What each strategy for LoRA promises of the weights that it makes, against plain matrices in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site, errors_together, serving

from fl_adapters import Job
from fl_runtime.aggregation import FedExLoRA, FlexLoRA, FLoRA, RoLoRA, known_strategies, make_strategy
from fl_runtime.aggregation.lora.algebra import factorized
from fl_runtime.aggregation.lora.names import Pair, pairs_of
from fl_runtime.aggregation.lora.products import ENCODING, LoraProducts
from fl_runtime.errors import ConfigError, HandshakeError, StateMismatchError, UpdateRefusedError
from fl_runtime.types import Array, Arrays, ServerState, Strategy, Terms, Update
from fl_runtime.wire.manifest import Manifest

OUT, IN = 12, 20
A, B, HEAD = "layer.lora_A.weight", "layer.lora_B.weight", "head.bias"
EXAMPLES = (30, 10, 70)
SHARES = np.array(EXAMPLES) / sum(EXAMPLES)


def factors(rank: int, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    made = {A: rng.normal(size=(rank, IN)), B: rng.normal(size=(OUT, rank)), HEAD: rng.normal(size=3)}
    return {name: array.astype(np.float32) for name, array in made.items()}


def product(arrays: Arrays) -> Array:
    return arrays[B].astype(np.float64) @ arrays[A].astype(np.float64)


def update(number: int, arrays: Arrays, round: int = 1, **changed: Any) -> Update:
    fields: dict[str, Any] = {"content": "encoded", "encoding": ENCODING, **changed}
    return Update(
        job="", round=round, stage="", site=f"site-{number + 1}", attempt=1, base_version=round - 1, arrays=arrays,
        num_examples=EXAMPLES[number], **fields,
    )  # fmt: skip


def in_memory(arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
    return {name: np.empty_like(array) for name, array in arrays.items()}, {}


def after(strategy: Strategy, base: Arrays, sites: list[dict[str, Array]]) -> Arrays:
    aggregator = strategy.aggregator(base, in_memory, {}, ServerState())
    for number, arrays in enumerate(sites):
        aggregator.add(update(number, arrays))
    return aggregator.result()[0]


def close(actual: Array, expected: Array) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_best_approximation_of_a_product() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(OUT, 5)), rng.normal(size=(5, IN))
    u, s, vt = np.linalg.svd(left @ right)
    for rank in (1, 3, 5, 9):
        b, a = factorized(left, right, rank)
        kept = min(rank, 5)
        close(b @ a, (u[:, :kept] * s[:kept]) @ vt[:kept])
        close(a @ a.T, np.eye(len(a)))  # rows to go on from, also where B is zero
    b, a = factorized(left, np.concatenate([right[:2], right[:2], right[:1]]))
    assert a.shape[0] == 2  # as many dimensions as the product has
    b, a = factorized(0 * left, right)
    assert b.shape == (OUT, 0) and a.shape == (0, IN)


@pytest.mark.parametrize("ranks", [(2, 4, 8), (12, 12, 12), (3, 3, 3)])
def test_flexlora_is_the_truncated_mean_of_products(ranks: tuple[int, ...]) -> None:
    sites = [factors(rank, seed) for seed, rank in enumerate(ranks)]
    mean = sum(p * product(site) for p, site in zip(SHARES, sites, strict=True))
    actual = after(FlexLoRA(), factors(ranks[0], 9), sites)
    u, s, vt = np.linalg.svd(mean)
    rank = max(ranks)
    assert actual[A].shape == (rank, IN) and actual[B].shape == (OUT, rank) and actual[A].dtype == np.float32
    close(product(actual), (u[:, :rank] * s[:rank]) @ vt[:rank])
    close(actual[HEAD], sum(p * site[HEAD] for p, site in zip(SHARES, sites, strict=True)))
    close(product(after(FlexLoRA(rank=12), factors(ranks[0], 9), sites)), mean)


def test_fedex_adds_what_the_mean_factors_lack_in_every_round() -> None:
    """The merged weight is the mean of the sites' merged weights, whose base is that of the round before."""
    strategy, model = FedExLoRA(), factors(4, 9)
    for round in range(3):
        sites = [factors(4, 10 * round + number) for number in range(3)]
        before = model[B][:, 4:] @ model[A][4:]
        actual = after(strategy, model, sites)
        close(product(actual), before + sum(p * product(site) for p, site in zip(SHARES, sites, strict=True)))
        for name, part in ((A, actual[A][:4]), (B, actual[B][:, :4])):
            close(part, sum(p * site[name] for p, site in zip(SHARES, sites, strict=True)))
        assert actual[A].shape[0] <= 4 + min(OUT, IN)
        model = actual
    same = factors(4, 1)
    assert after(strategy, factors(4, 9), [same, same, same])[A].shape[0] == 4  # nothing is lacking


def test_flora_stacks_in_every_round() -> None:
    strategy, model = FLoRA(), factors(2, 9)
    for round in range(3):
        sites = [factors(rank, 10 * round + rank) for rank in (2, 4, 8)]
        actual = after(strategy, model, sites)
        close(product(actual), product(model) + sum(p * product(site) for p, site in zip(SHARES, sites, strict=True)))
        assert actual[A].shape[0] <= min(OUT, IN)
        model = actual
    nothing = {**factors(2, 0), B: np.zeros((OUT, 2), np.float32)}
    assert not product(after(strategy, nothing, [nothing, nothing])).any()


def test_equal_weights() -> None:
    sites = [factors(2, number) for number in range(3)]
    for kind in (FlexLoRA(rank=12, weights="equal"), FedExLoRA(weights="equal")):
        close(product(after(kind, factors(2, 9), sites)), sum(product(site) for site in sites) / 3)


def test_names_of_factors() -> None:
    names = """
        a.lora_A.weight a.lora_B.weight a.lora_magnitude_vector a.lora_A.bias
        b.lora_A.default.weight b.lora_B.default.weight c.lora_embedding_A c.lora_embedding_B
        d.lora_embedding_A.x d.lora_embedding_B.x e.lora_A.weight my_lora_A.weight
    """.split()
    assert pairs_of(names) == [
        Pair("a.lora_A.weight", "a.lora_B.weight"),
        Pair("b.lora_A.default.weight", "b.lora_B.default.weight"),
        Pair("c.lora_embedding_A", "c.lora_embedding_B"),
        Pair("d.lora_embedding_A.x", "d.lora_embedding_B.x"),
    ]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"content": "weights"}, "needs the factors of LoRA modules"),
        ({"encoding": "xgboost-trees"}, "needs the factors of LoRA modules"),
        ({"extras": {"exp_avg/x": np.zeros(2)}}, "no tensors beside the factors"),
        ({"arrays": {A: np.zeros((2, IN)), HEAD: np.zeros(3)}}, "lacks a factor"),
        ({"arrays": {A: np.zeros((2, IN)), B: np.zeros((OUT, 3))}}, "cannot be the factors of one LoRA module"),
        ({"arrays": {A: np.zeros((0, IN)), B: np.zeros((OUT, 0))}}, "cannot be the factors of one LoRA module"),
        ({"arrays": {A: np.zeros((50, IN)), B: np.zeros((OUT, 50))}}, "cannot be the factors of one LoRA module"),
    ],
)
def test_updates_that_no_aggregator_should_see(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(UpdateRefusedError, match=reason):
        FLoRA().check(update(0, changed.pop("arrays", factors(2, 0)), **changed))


@pytest.mark.parametrize(
    "spec", ["flexlora:rank=-1", "flexlora:rank=2.5", "flora:weights=some", "fedex-lora:rank=2", "rolora:every=2"]
)
def test_bad_arguments_are_refused_with_the_job(spec: str) -> None:
    with pytest.raises(ConfigError, match="strategy"):
        Job(app="train.py", sites=2, strategy=spec)


def test_weights_cannot_be_encrypted_or_filtered_where_products_are_summed() -> None:
    with pytest.raises(ConfigError, match="works on weights"):
        Job(app="train.py", sites=2, strategy="flora", filters=[{"name": "Quantize", "to": "int8"}])


def test_which_factor_is_frozen() -> None:
    assert [RoLoRA().configure(round, ["a"])["lora_frozen"] for round in (1, 2, 3)] == ["A", "B", "A"]
    assert make_strategy("fedit").configure(1, ["a"]) == {}
    assert {"fedit", "ffa-lora", "rolora", "fedsa-lora", "flora", "flexlora", "fedex-lora"} <= set(known_strategies())


def register(site: Site, arrays: Arrays, capabilities: frozenset[str] = frozenset({"lora"})) -> None:
    site.join()
    site.client.register(
        Manifest.of(arrays), agreement={}, info={}, capabilities=capabilities, rounds=0, evaluates=False,
        terms=Terms(content="encoded"),
    )  # fmt: skip


@pytest.mark.parametrize("strategy", [FLoRA(), FlexLoRA(rank=12)])
def test_mixed_ranks_through_the_server(tmp_path: Path, strategy: LoraProducts) -> None:
    with serving(tmp_path, 3, sockets=False, rounds=2, strategy=strategy.spec) as bench:

        def work(name: str) -> Arrays:
            site, number = bench.site(name), bench.names.index(name)
            rank = (2, 4, 8)[number]
            register(site, factors(rank, 0))
            task, how = site.client.next_task(), {"content": "encoded", "encoding": ENCODING}
            if task.kind == "initial":
                site.submit(task, {**factors(rank, 0), B: np.zeros((OUT, rank), np.float32)}, **how)
                task = site.client.next_task()
            while task.kind == "train":
                site.submit(task, factors(rank, 10 * task.round + number), EXAMPLES[number], **how)
                task = site.client.next_task()
            actual = {key: np.copy(array) for key, array in task.arrays.items()}
            site.client.leave("done", early=False)
            return actual

        final = bench.run(work)
    learnt = [
        sum(
            p * product(factors(rank, 10 * round + i))
            for i, (p, rank) in enumerate(zip(SHARES, (2, 4, 8), strict=True))
        )
        for round in (1, 2)
    ]
    for model in final.values():
        close(product(model), learnt[1] if isinstance(strategy, FlexLoRA) else learnt[0] + learnt[1])


@pytest.mark.parametrize("strategy", ["fedex-lora", "fedit"])
def test_different_ranks_are_refused_where_the_method_needs_one(tmp_path: Path, strategy: str) -> None:
    with serving(tmp_path, 2, sockets=False, strategy=strategy) as bench:
        one, two = (bench.site(name) for name in bench.names)
        errors = errors_together(lambda: register(one, factors(2, 0)), lambda: register(two, factors(4, 0)))
    assert all(isinstance(error, StateMismatchError) and A in error.what for error in errors)


def test_other_shapes_are_refused_where_ranks_may_differ(tmp_path: Path) -> None:
    other = {**factors(4, 0), A: np.zeros((4, IN + 1), np.float32)}
    with serving(tmp_path, 2, sockets=False, strategy="flora") as bench:
        one, two = (bench.site(name) for name in bench.names)
        errors = errors_together(lambda: register(one, factors(2, 0)), lambda: register(two, other))
    assert all(isinstance(error, StateMismatchError) and A in error.what for error in errors)


def test_an_adapter_without_lora_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, 1, sockets=False, strategy="ffa-lora") as bench:
        site = bench.site("site-1")
        site.join()
        with pytest.raises(HandshakeError, match="capability lora, which the adapter of site-1"):
            site.register(factors(2, 0))
