"""What a round does to the trainer: weights, evaluation, checkpoints, logs, and the run's results."""

from __future__ import annotations

import json
from pathlib import Path

import hf_models as m
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from fl_adapters.hf import FederatedCallback
from fl_adapters.torch.state import TorchState
from fl_runtime.errors import AbortedError, ConfigError, FederationError, StateMismatchError


class Recorder(TrainerCallback):
    """Notes the travelling tensors when HF evaluates, and the steps at which it evaluates and saves."""

    def __init__(self, exchange="auto") -> None:
        self.evaluated: dict[int, dict] = {}
        self.evaluations: list[int] = []
        self.saves: list[int] = []

    def on_evaluate(self, args, state, control, model=None, **_: object) -> None:
        self.evaluations.append(state.global_step)
        self.evaluated[state.global_step] = copied(model)

    def on_save(self, args, state, control, **_: object) -> None:
        self.saves.append(state.global_step)


def copied(model) -> dict:
    return {name: np.copy(array) for name, array in TorchState(model).get_state().items()}


def same(a, b) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[n], b[n]) for n in a)


def halved(_round: int, arrays):
    return {name: array / 2 for name, array in arrays.items()}


def test_after_training_the_model_holds_the_global_weights(federation) -> None:
    run = federation(sites=2, rounds=3)
    model = m.adapted(m.classifier())
    objects = {name: id(p) for name, p in model.named_parameters()}
    partner = run.partner(m.adapted(m.classifier()), halved)
    trainer = m.trainer(FederatedCallback(kit=run.kit()), model=model)
    trainer.train()
    partner.ended()
    assert same(copied(model), partner.received[-1])
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    # and the average is weighted: 32 rows here, 32 there
    assert not same(partner.received[0], partner.received[1])


@pytest.mark.parametrize(
    ("strategies", "evaluated", "saved"),
    [
        ({}, [4, 8], []),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, [4, 8], [4, 8]),
        ({"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}, [2, 4, 6, 8], [4, 8]),
        ({"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "epoch"}, [3, 4, 6, 8], [4, 8]),
        ({"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 3}, [4, 8], [3, 6, 8]),
    ],
)
@pytest.mark.parametrize("every", ["epoch", 4])
def test_global_model_is_evaluated_once_and_saved_as_evaluated(federation, strategies, evaluated, saved, every) -> None:
    run = federation(sites=2, rounds=2, every=every)
    partner = run.partner(m.adapted(m.classifier()), halved)
    recorder = Recorder()
    trainer = m.trainer(
        FederatedCallback(kit=run.kit()), eval_dataset=m.Tokens(16, seed=5), callbacks=[recorder], **strategies
    )
    trainer.train()
    partner.ended()
    run.ended()
    assert recorder.evaluations == evaluated and recorder.saves == saved
    for round, step in ((1, 4), (2, 8)):
        assert same(recorder.evaluated[step], partner.received[round])
        if step in saved:
            saved_arrays = load_file(Path(trainer.args.output_dir, f"checkpoint-{step}", "adapter_model.safetensors"))
            assert all(np.array_equal(saved_arrays[n], partner.received[round][n]) for n in saved_arrays)
    losses = {r["step"]: r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r}
    scores = run.events_of("report", "site-1")
    assert [e.data["metrics"]["loss"] for e in scores] == [losses[4], losses[8]]


def test_evaluate_global_off_leaves_evaluation_to_the_user(federation) -> None:
    run = federation(rounds=2)
    recorder = Recorder()
    m.trainer(
        FederatedCallback(kit=run.kit(), evaluate_global=False), eval_dataset=m.Tokens(16), callbacks=[recorder]
    ).train()
    assert recorder.evaluations == [] and not run.events_of("report")


def test_evaluate_global_without_validation_data_is_refused(federation) -> None:
    with pytest.raises(ConfigError, match="eval_dataset"):
        m.trainer(FederatedCallback(kit=federation().kit(), evaluate_global=True))


def test_evaluation_that_another_callback_prevents_holds_nobody_up(federation) -> None:
    class Prevent(TrainerCallback):
        def on_step_end(self, args, state, control, **_: object) -> None:
            control.should_evaluate = False

    run = federation(rounds=2)
    m.trainer(FederatedCallback(kit=run.kit()), eval_dataset=m.Tokens(8), callbacks=[Prevent()]).train()
    assert len(run.ended().rounds) == 2


def test_several_validation_sets_make_one_score(federation) -> None:
    run = federation(rounds=1)
    sets = {"a": m.Tokens(8, seed=1), "b": m.Tokens(24, seed=2)}
    trainer = m.trainer(FederatedCallback(kit=run.kit()), eval_dataset=sets)
    trainer.train()
    run.ended()
    (score,) = run.events_of("report")
    log = {k: v for row in trainer.state.log_history for k, v in row.items()}
    assert score.data["metrics"]["a_loss"] == log["eval_a_loss"]
    assert score.data["metrics"]["loss"] == pytest.approx(log["eval_a_loss"] / 4 + log["eval_b_loss"] * 3 / 4)
    assert score.data["num_examples"] == 32


def test_rounds_are_in_the_frameworks_own_log(federation) -> None:
    run = federation(sites=2, rounds=2)
    partner = run.partner(m.adapted(m.classifier()))
    logged: list[dict] = []

    class Logger(TrainerCallback):  # as a tensorboard or w&b callback
        def on_log(self, args, state, control, logs=None, **_: object) -> None:
            logged.append(dict(logs))

    trainer = m.trainer(
        callbacks=[Logger(), FederatedCallback(kit=run.kit())], logging_strategy="steps", logging_steps=4
    )
    trainer.train()
    partner.ended()
    history = trainer.state.log_history
    rows = [row for row in history if "federation_round" in row]
    assert [(row["federation_round"], row["step"]) for row in rows] == [(1, 4), (2, 8)]
    size = sum(array.nbytes for array in partner.received[0].values())
    assert all(row["federation_bytes_up"] >= size and row["federation_bytes_down"] >= size for row in rows)
    assert all(row["federation_seconds"] > 0 for row in rows)
    assert [r["federation_round"] for r in logged if "federation_round" in r] == [1, 2]
    assert all("federation_job" not in row for row in logged)  # loggers get numbers
    assert [row["step"] for row in history if "loss" in row] == [4, 8]  # the user's own rows are still there
    json.dumps(history)


def test_training_loss_of_the_round_without_any_logging(federation) -> None:
    run = federation(rounds=2)
    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_: object) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    m.trainer(FederatedCallback(kit=run.kit()), logging_strategy="no").train()
    silent = [e.data["metrics"]["train_loss"] for e in run.events_of("update")]
    run = federation(rounds=2)
    m.trainer(FederatedCallback(kit=run.kit()), logging_strategy="steps", logging_steps=1, callbacks=[Watch()]).train()
    noisy = [e.data["metrics"]["train_loss"] for e in run.events_of("update")]
    assert silent == pytest.approx(
        [np.mean(losses[:4]), np.mean(losses[4:])], abs=1e-4
    )  # transformers 4 rounds what it logs
    assert noisy == pytest.approx(silent, abs=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("save", [None, ["classifier"]])
def test_results_open_with_peft(federation, method, save) -> None:
    run = federation(rounds=1)
    model = m.adapted(m.classifier(), method, modules_to_save=save)
    m.trainer(FederatedCallback(kit=run.kit()), model=model, eval_dataset=m.Tokens(8)).train()
    run.ended()
    x = torch.arange(8).reshape(1, 8)
    for folder in ("model", "best"):
        opened = peft.PeftModel.from_pretrained(m.classifier(), run.folder / folder)
        assert torch.equal(opened.eval()(x).logits, model.eval()(x).logits)
    assert {f.name for f in Path(run.folder, "model").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
    }


def test_full_fine_tuning_and_its_results(federation) -> None:
    run = federation(sites=2, rounds=2)
    model = m.classifier()
    partner = run.partner(m.classifier(), halved)
    m.trainer(FederatedCallback(kit=run.kit()), model=model).train()
    partner.ended()
    run.ended()
    assert same(copied(model), partner.received[-1])
    opened = type(model).from_pretrained(run.folder / "model")
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), model.parameters(), strict=True))


def test_bf16_autocast_keeps_float32_weights_on_the_way(federation) -> None:
    run = federation(rounds=1)
    model = m.adapted(m.classifier())
    trainer = m.trainer(FederatedCallback(kit=run.kit()), model=model, bf16=True)
    trainer.train()
    run.ended()
    assert {array.dtype.name for array in copied(model).values()} == {"float32"}


def test_bfloat16_weights_travel_as_they_are(federation) -> None:
    run = federation(sites=2, rounds=1)
    model = m.classifier().to(torch.bfloat16)
    partner = run.partner(m.classifier().to(torch.bfloat16))
    m.trainer(FederatedCallback(kit=run.kit()), model=model).train()
    partner.ended()
    assert partner.received[-1]["classifier.weight"].dtype.name == "bfloat16"
    assert same(copied(model), partner.received[-1])


def test_keep_local_stays_at_the_site(federation) -> None:
    run = federation(rounds=1)
    model = m.classifier()
    callback = FederatedCallback(kit=run.kit(), keep_local=["classifier.*"])
    m.trainer(callback, model=model).train()
    run.ended()
    stored = run.model()
    assert stored and not [name for name in stored if name.startswith("classifier.")]


# --- the best round ----------------------------------------------------------------------------------------------


def spoiled_after_round_1(round: int, arrays):
    return {n: a * 50 for n, a in arrays.items()} if round > 1 else arrays


BEST = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}


def test_load_best_model_at_end_is_the_best_global_round(federation) -> None:
    run = federation(sites=2, rounds=3)
    partner = run.partner(m.adapted(m.classifier()), spoiled_after_round_1, num_examples=3200)
    model = m.adapted(m.classifier())
    trainer = m.trainer(FederatedCallback(kit=run.kit()), model=model, eval_dataset=m.Tokens(32), **BEST)
    trainer.train()
    partner.ended()
    assert run.ended().best_round == 1
    assert same(copied(model), partner.received[1])
    final = load_file(run.folder / "model" / "adapter_model.safetensors")
    assert all(np.array_equal(final[n], partner.received[3][n]) for n in final)
    best = load_file(run.folder / "best" / "adapter_model.safetensors")
    assert all(np.array_equal(best[n], partner.received[1][n]) for n in best)
    losses = {r["step"]: r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r}
    assert trainer.state.best_global_step == 4 and trainer.state.best_metric == losses[4]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")


@pytest.mark.parametrize(
    ("settings", "arguments", "reason"),
    [
        ({"best_metric": "loss"}, {"metric_for_best_model": "accuracy"}, "best_metric: accuracy"),
        ({"best_mode": "min"}, {"greater_is_better": True}, "best_mode: max"),
    ],
)
def test_another_meaning_of_best_is_refused(federation, settings, arguments, reason) -> None:
    run = federation(**settings)
    with pytest.raises(ConfigError, match=reason):
        m.trainer(FederatedCallback(kit=run.kit()), eval_dataset=m.Tokens(8), **BEST, **arguments)


def test_metric_for_best_model_picks_the_best_round(federation) -> None:
    run = federation(rounds=3)
    trainer = m.trainer(
        FederatedCallback(kit=run.kit()),
        eval_dataset=m.Tokens(32),
        compute_metrics=lambda scored: {"spread": float(np.std(scored.predictions))},
        metric_for_best_model="spread",
        **BEST,
    )
    trainer.train()
    result = run.ended()
    spreads = [r.metrics["spread"] for r in result.rounds]
    assert result.best_round == 1 + int(np.argmax(spreads))
    assert trainer.state.best_metric == pytest.approx(max(spreads))


def test_best_without_scores_is_refused(federation) -> None:
    with pytest.raises(ConfigError, match="evaluate_global"):
        m.trainer(FederatedCallback(kit=federation().kit(), evaluate_global=False), eval_dataset=m.Tokens(8), **BEST)


# --- ends that come early ----------------------------------------------------------------------------------------


def test_local_early_stop_leaves_the_others_going(federation) -> None:
    run = federation(sites=2, rounds=4, min_sites=1)
    partner = run.partner(m.adapted(m.classifier()), spoiled_after_round_1, num_examples=3200)
    trainer = m.trainer(
        FederatedCallback(kit=run.kit()),
        eval_dataset=m.Tokens(32),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        **BEST,
    )
    trainer.train()
    partner.ended()
    assert trainer.state.global_step == 8
    assert len(run.ended().rounds) == 4
    (left,) = run.events_of("left", "site-1")
    assert "the trainer stopped at step" in left.data["reason"]


def test_failed_run_ends_training_with_its_error(federation) -> None:
    run = federation(sites=2, rounds=3)

    def fail(round: int, arrays):
        raise RuntimeError("the other site broke")

    run.partner(m.adapted(m.classifier()), fail)
    with pytest.raises(FederationError, match="the other site broke|fewer|site-2"):
        m.trainer(FederatedCallback(kit=run.kit())).train()


# --- sites that do not fit together ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: m.adapted(m.classifier(), r=4), "peft.r"),
        (lambda: m.adapted(m.classifier(), lora_alpha=99), "peft.lora_alpha"),
        (lambda: m.adapted(m.classifier(), use_rslora=True), "peft.use_rslora"),
        (lambda: m.adapted(m.classifier(), modules_to_save=["classifier"]), "classifier"),
        (lambda: m.adapted(m.classifier(seed=9)), "base.fingerprint"),
        (lambda: m.adapted(m.classifier()).to(torch.float64), "float64"),
    ],
    ids=["rank", "alpha", "rslora", "modules_to_save", "base model", "dtype"],
)
def test_sites_that_differ_are_refused_before_round_1(federation, other, named) -> None:
    run = federation(sites=2)
    partner = run.partner(other())
    trainer = m.trainer(FederatedCallback(kit=run.kit()))
    with pytest.raises(FederationError, match=named) as error:
        trainer.train()
    assert "site-2" in str(error.value) and trainer.state.global_step == 0
    with pytest.raises(FederationError, match=named):
        partner.ended()


def test_other_target_modules_are_refused_with_the_difference(federation) -> None:
    run = federation(sites=2)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["key"], task_type="SEQ_CLS", init_lora_weights=False)
    run.partner(peft.get_peft_model(m.classifier(), config))
    with pytest.raises((StateMismatchError, AbortedError, FederationError), match="query"):
        m.trainer(FederatedCallback(kit=run.kit())).train()


def test_weights_that_are_not_finite_are_refused_and_named(federation) -> None:
    run = federation(rounds=2)

    class Break(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **_: object) -> None:
            if state.global_step == 2:
                next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] = float("nan")

    with pytest.raises(FederationError, match="lora_A"):
        m.trainer(FederatedCallback(kit=run.kit()), callbacks=[Break()]).train()


# --- what cannot work --------------------------------------------------------------------------------------------


def test_auto_find_batch_size_is_refused_at_construction(federation) -> None:
    with pytest.raises(ConfigError, match="auto_find_batch_size"):
        m.trainer(FederatedCallback(kit=federation().kit()), auto_find_batch_size=True)


def test_average_of_factored_moments_is_refused_before_the_first_step(federation) -> None:
    run = federation()
    trainer = m.trainer(FederatedCallback(kit=run.kit(), optimizer_state="average"), optim="adafactor")
    with pytest.raises(ConfigError, match="rows and columns"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_outside_a_federation_it_stays_out_of_the_way(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    monkeypatch.setattr("fl_adapters.participant.registry._announced_alone", False)
    torch.manual_seed(0)
    plain = m.trainer()
    plain.train()
    trainer = m.trainer(FederatedCallback())
    trainer.train()
    assert same(copied(plain.model), copied(trainer.model))
    assert trainer.args.output_dir == "out" and not any("federation_round" in r for r in trainer.state.log_history)
    lines = [line for line in capfd.readouterr().err.splitlines() if "fl-adapters" in line]
    assert len(lines) == 1
    with pytest.raises(ConfigError, match="required=True"):
        m.trainer(FederatedCallback(required=True))
