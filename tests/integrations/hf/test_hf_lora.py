"""Strategies for LoRA with real Trainers: what each promises of the merged weights, W + s B A."""

from __future__ import annotations

from typing import Any

import hf_models as m
import numpy as np
import pytest

SITE = """
import copy
import os
import tempfile
import numpy as np
import peft
import torch
from transformers import TrainerCallback
import hf_models as m
from fl_adapters.hf import FederatedCallback

torch.set_num_threads(1)
plain = m.classifier()
torch.manual_seed(VALUES.get("seed", 0))
model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**{
    "r": VALUES["r"], "lora_alpha": 3, "target_modules": ["query", "value"], "task_type": "SEQ_CLS",
    "init_lora_weights": False, **VALUES.get("options", {}),
}))

def merged(model):
    layers = {n.removeprefix("base_model.model."): l for n, l in model.named_modules() if hasattr(l, "lora_A")}
    found = {n: (l.get_base_layer().weight + l.get_delta_weight("default")).detach().numpy() for n, l in layers.items()}
    head = dict(model.named_parameters())["base_model.model.classifier.modules_to_save.default.weight"]
    return {**found, "head": head.detach().numpy().copy()}

def factors(model):
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters() if "lora_" in n}

class Look(TrainerCallback):
    def __init__(self):
        self.merged, self.factors, self.trained = [], [], []
    def on_step_end(self, args, state, control, **_):
        if state.global_step == VALUES.get("die_at"):
            os._exit(9)
        if state.global_step % 2 == 0:
            self.merged.append(merged(model))
            self.factors.append(factors(model))
            self.trained.append({n for n, p in model.named_parameters() if p.requires_grad})

before, after = Look(), Look()
callback = FederatedCallback(every=2, **VALUES.get("callback", {}))
trainer = m.trainer(
    None, model=model, callbacks=[before, callback, after],
    train_dataset=m.Tokens(VALUES["rows"], seed=VALUES["rows"]), learning_rate=0.05,
    eval_dataset=m.Tokens(16, seed=9) if VALUES.get("arguments") else None, **VALUES.get("arguments", {}),
)
trainer.train()
mine = os.path.join(tempfile.mkdtemp(), "mine")  # a path in the working directory would be moved below the run
trainer.save_model(mine)
opened = peft.PeftModel.from_pretrained(copy.deepcopy(plain), mine)
bases = [l.get_base_layer().weight for l in model.modules() if hasattr(l, "lora_A")]
olds = [l.get_base_layer().weight for l in opened.modules() if hasattr(l, "lora_A")]
RESULT = {
    "before": before.merged, "after": after.merged, "before_factors": before.factors, "after_factors": after.factors,
    "trained": before.trained, "final": merged(model), "opened": merged(opened),
    "left": {n for n, p in model.named_parameters() if p.requires_grad},
    "base_is_back": all(torch.equal(a, b) for a, b in zip(bases, olds)),
    "ranks": sorted({l.r["default"] for l in model.modules() if hasattr(l, "lora_A")}),
}
"""

ROWS = (32, 16)
SHARES = np.array(ROWS) / sum(ROWS)


def trained(federation: Any, strategy: str, ranks: tuple[int, int], rounds: int = 2, **values: Any) -> list[Any]:
    """Train two sites, and return their results."""
    run = federation(sites=2, rounds=rounds, strategy=strategy)
    sites = [
        run.fork(SITE, {"r": rank, "rows": rows, **values}, number=number)
        for number, (rank, rows) in enumerate(zip(ranks, ROWS, strict=True), start=1)
    ]
    found = [site.result() for site in sites]
    run.ended()
    return found


def mean(sites: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: sum(p * site[name] for p, site in zip(SHARES, sites, strict=True)) for name in sites[0]}


def close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name in found:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)


def means_hold(sites: list[Any], rounds: int = 2) -> None:
    """Check that after every round both sites have the mean of what they had before it."""
    for number in range(rounds):
        wanted = mean([site["before"][number] for site in sites])
        for site in sites:
            close(site["after"][number], wanted)
            assert any(np.abs(site["before"][number][n] - wanted[n]).max() > 1e-3 for n in wanted)  # they had trained


def saved_is_final(sites: list[Any]) -> None:
    for site in sites:
        close(site["opened"], site["final"])
        assert site["base_is_back"]


@pytest.mark.parametrize(
    ("strategy", "ranks", "values"),
    [
        ("ffa-lora", (2, 2), {}),
        ("rolora", (2, 2), {}),
        ("rolora", (2, 2), {"options": {"use_rslora": True}}),
        ("flexlora", (16, 16), {}),
        ("fedex-lora", (4, 4), {}),
        ("fedex-lora", (4, 4), {"options": {"use_rslora": True, "target_modules": ["query", "word_embeddings"]}}),
        ("flora", (2, 8), {}),
        ("flora", (2, 4), {"options": {"use_rslora": True, "target_modules": ["query", "word_embeddings"]}}),
    ],
)
def test_merged_weight_is_the_mean_of_the_sites(federation, strategy: str, ranks, values) -> None:
    sites = trained(federation, strategy, ranks, **values)
    means_hold(sites)
    for site in sites:
        close(site["final"], site["after"][-1])
    saved_is_final(sites)


def test_flexlora_with_mixed_ranks(federation) -> None:
    """Each site trains its own rank; the final model has all of the global one."""
    sites = trained(federation, "flexlora:rank=16", (2, 4))
    wanted = mean([site["before"][-1] for site in sites])
    for site, rank in zip(sites, (2, 4), strict=True):
        close(site["final"], wanted)
        assert all(f.shape[0] == rank for n, f in site["after_factors"][0].items() if "lora_A" in n)
    assert np.abs(sites[0]["after"][0]["head"] - mean([s["before"][0] for s in sites])["head"]).max() < 1e-5
    saved_is_final(sites)


def test_fedit_averages_factors(federation) -> None:
    sites = trained(federation, "fedit", (2, 2))
    close(sites[0]["after_factors"][-1], mean([site["before_factors"][-1] for site in sites]))
    saved_is_final(sites)


def test_rolora_trains_one_factor_a_round(federation) -> None:
    site = trained(federation, "rolora", (2, 2))[0]
    first, second = ({n for n in names if "lora_" in n} for names in site["trained"])
    assert first and all("lora_B" in n for n in first)
    assert second and all("lora_A" in n for n in second)
    assert {n for n in site["left"] if "lora_" in n} == first | second  # all is as before the run


def test_fedsa_keeps_b_at_the_site(federation) -> None:
    sites = trained(federation, "fedsa-lora", (2, 2))
    found = [site["after_factors"][-1] for site in sites]
    wanted = mean([site["before_factors"][-1] for site in sites])
    for name in wanted:
        if "lora_A" in name:
            np.testing.assert_allclose(found[0][name], wanted[name], atol=1e-6)
            assert np.array_equal(found[0][name], found[1][name])
        else:
            assert not np.allclose(found[0][name], found[1][name])
            assert np.array_equal(found[0][name], sites[0]["before_factors"][-1][name])


def test_what_travels(federation) -> None:
    """FFA-LoRA and FedSA-LoRA send one factor only; RoLoRA sends one to the server."""
    run = federation(rounds=2, strategy="ffa-lora")
    run.fork(SITE, {"r": 2, "rows": 16}).result()
    run.ended()
    assert any("lora_B" in name for name in run.model())
    assert not any("lora_A" in name for name in run.model())
    sizes = {}
    for strategy in ("fedit", "rolora"):
        run = federation(rounds=2, strategy=strategy)
        run.fork(SITE, {"r": 8, "rows": 16}).result()
        run.ended()
        sizes[strategy] = [event.data["bytes_up"] for event in run.events_of("update")]
    one_factor = 2 * 8 * 16 * 4  # of two modules
    for full, half in zip(sizes["fedit"], sizes["rolora"], strict=True):
        assert abs(full - half - one_factor) < 600


def test_dora_sums_directions_and_averages_magnitudes(federation) -> None:
    sites = trained(federation, "fedex-lora", (2, 2), options={"use_dora": True})
    means_hold(sites)
    magnitudes = [name for name in sites[0]["after_factors"][-1] if "magnitude" in name]
    wanted = mean([site["before_factors"][-1] for site in sites])
    assert magnitudes
    for name in magnitudes:
        np.testing.assert_allclose(sites[0]["after_factors"][-1][name], wanted[name], atol=1e-6)


def test_other_a_is_refused_by_ffa_lora(federation) -> None:
    run = federation(sites=2, rounds=1, strategy="ffa-lora")
    sites = [run.fork(SITE, {"r": 2, "rows": 16, "seed": number}, number=number) for number in (1, 2)]
    for site in sites:
        assert "lora_A (frozen; seed the script before PEFT makes it)" in site.error()


@pytest.mark.parametrize(
    ("strategy", "ranks", "reason"),
    [("fedit", (2, 4), "lora_A.weight"), ("fedex-lora", (2, 4), "lora_A.weight")],
)
def test_other_ranks_are_refused_before_round_1(federation, strategy: str, ranks, reason: str) -> None:
    run = federation(sites=2, rounds=1, strategy=strategy)
    sites = [run.fork(SITE, {"r": r, "rows": 16}, number=i) for i, r in enumerate(ranks, start=1)]
    for site in sites:
        error = site.error()
        assert reason in error and "peft.r: 2 != 4" in error


def test_best_round_at_the_end(federation) -> None:
    """HF first loads its own checkpoint, of the site's rank; the server's best round must replace it."""
    saving = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False,
    }  # fmt: skip
    run = federation(sites=2, rounds=3, strategy="flora", best_metric="loss", best_mode="min")
    forked = [
        run.fork(SITE, {"r": r, "rows": n, "arguments": saving}, number=i)
        for i, (r, n) in enumerate(zip((2, 4), ROWS, strict=True), start=1)
    ]
    sites = [site.result() for site in forked]
    best = run.ended().best_round
    wanted = mean([site["before"][best - 1] for site in sites])
    for site in sites:
        close(site["final"], wanted)
    saved_is_final(sites)


@pytest.mark.parametrize("strategy", ["flora", "fedex-lora"])
def test_a_site_that_comes_back_has_the_base_of_the_others(federation, strategy: str) -> None:
    run = federation(sites=2, rounds=3, strategy=strategy)
    two = run.fork(SITE, {"r": 2, "rows": ROWS[1]}, number=2)
    first = run.fork(SITE, {"r": 2, "rows": ROWS[0], "die_at": 3}, number=1)  # in the middle of round 2
    first.process.join()
    sites = [run.fork(SITE, {"r": 2, "rows": ROWS[0]}, number=1).result(), two.result()]
    wanted = mean([site["before"][-1] for site in sites])
    for site in sites:
        close(site["final"], wanted)
    saved_is_final(sites)


def test_model_without_an_adapter_is_refused(federation) -> None:
    from fl_adapters.hf import FederatedCallback
    from fl_runtime.errors import HandshakeError

    trainer = m.trainer(FederatedCallback(kit=federation(strategy="flora").kit()), model=m.classifier())
    with pytest.raises(HandshakeError, match="capability lora"):
        trainer.train()
