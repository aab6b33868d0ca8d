"""Cross-site evaluation by the trainer's own evaluation, which leaves no trace in the trainer."""

from __future__ import annotations

from typing import Any

import hf_example
import hf_models as m
import numpy as np
import pytest
import torch
from hf_example import BATCH, CLIP, RATE
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from fl_adapters.hf import FederatedCallback
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.session import Session
from fl_adapters.testing import CrossSiteCase, LocalFederation, Trained, cross_site_cases
from fl_adapters.torch.state import TorchState
from fl_runtime.types import Arrays


class Still(Trainer):
    """A Trainer whose evaluation does not draw from the random state of dropout."""

    def evaluate(self, *args: Any, **options: Any) -> Any:
        before = torch.get_rng_state()
        try:
            return super().evaluate(*args, **options)
        finally:
            torch.set_rng_state(before)


class Scored(hf_example.Example):
    """A training job with two validation sets, which HF logs as "a_loss" and "b_loss"."""

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        net = hf_example.made(site)
        options = TrainingArguments(
            output_dir="out",
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            max_grad_norm=CLIP,
            learning_rate=RATE,
            seed=site,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        sets = {name: hf_example.rows_of(number + site) for name, number in (("a", 200), ("b", 300))}
        given = {"train_dataset": hf_example.rows_of(site), "eval_dataset": sets}
        trainer = Still(net, options, callbacks=[FederatedCallback(**arguments)], **given)
        trainer.train()
        return Trained(hf_example.weights(net), trainer.state.global_step)

    def score(self, site: int, weights: Arrays) -> dict[str, float]:
        net = hf_example.Net().eval()
        net.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        found = {}
        for name, number in (("a", 200), ("b", 300)):
            rows = hf_example.rows_of(number + site)
            with torch.no_grad():
                out = net(*(torch.stack([row[key] for row in rows]) for key in ("x", "labels")))
            found[f"{name}_loss"] = float(out["loss"])
        return {**found, "loss": float(np.mean(list(found.values())))}


@pytest.mark.parametrize("case", cross_site_cases(), ids=lambda case: case.__name__)
def test_the_callback_conforms(case: CrossSiteCase, tmp_path: Any) -> None:
    case(Scored(str(tmp_path)))


class Ears(TrainerCallback):
    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.heard.append(("evaluate", state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.heard.append(("log", state.global_step))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.heard.append(("prediction", state.global_step))


def plain_rows(state: Any) -> list[dict[str, Any]]:
    """Return HF's log without times."""
    timed = ("runtime", "per_second", "seconds")
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in state.log_history]


@pytest.mark.parametrize("best", [False, True])
def test_the_trainer_knows_nothing_of_it(best: bool, tmp_path: Any) -> None:
    def left(cross_site: bool) -> Any:
        states = [(torch.get_rng_state, torch.set_rng_state)]
        with LocalFederation(sites=2, rounds=3, cross_site=cross_site, states=states) as federation:

            def site(place: Any) -> Any:
                model, ears = m.classifier(), Ears()
                live = [p.data_ptr() for p in model.parameters()]
                options = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
                more = [ears, *([EarlyStoppingCallback(5)] if best else [])]
                trainer = m.trainer(
                    FederatedCallback(kit=place.kit),
                    model=model,
                    train_dataset=m.Tokens(32, place.index),
                    eval_dataset=m.Tokens(16, 50 + place.index),
                    callbacks=more,
                    output_dir=str(tmp_path / f"{cross_site}-{best}-{place.name}"),
                    num_train_epochs=9,
                    **(options if best else {}),
                )
                trainer.train()
                assert [p.data_ptr() for p in model.parameters()] == live
                state = trainer.state
                weights = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
                optimizer = [v.clone() for s in trainer.optimizer.state_dict()["state"].values() for v in s.values()]
                told = (plain_rows(state), state.best_metric, state.best_global_step, ears.heard)
                return told, weights, optimizer, vars(trainer.control).copy(), trainer.is_in_train

            found = federation.run(site)
            federation.result()
            final = federation.model("best" if best else "final")
        scores = [e.data["metrics"]["loss"] for e in federation.events if e.kind == "cross_score"]
        assert len(scores) == (4 if cross_site else 0)
        return found["site-1"], final

    (told, weights, optimizer, flags, training), final = left(True)
    (told_alone, weights_alone, optimizer_alone, flags_alone, _), _ = left(False)
    assert told == told_alone and (flags, training) == (flags_alone, False)
    assert all(np.array_equal(weights[n], weights_alone[n]) and np.array_equal(weights[n], final[n]) for n in final)
    assert all(torch.equal(a, b) for a, b in zip(optimizer, optimizer_alone, strict=True))


@pytest.mark.parametrize(("strategy", "lora"), [("ditto", False), ("rolora", True), ("ffa-lora", True)])
def test_what_strategies_leave_at_a_site_does_not_come_into_it(
    strategy: str, lora: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Personal models and fixed LoRA factors stay out: each scored model is the one that its site has sent."""
    monkeypatch.chdir(tmp_path)
    sent: dict[str, dict[str, Any]] = {}
    submit = Session.submit

    def noted(self: Session, arrays: Arrays, result: LocalResult, **more: Any) -> str:
        sent[self.name] = {name: np.array(array) for name, array in arrays.items()}
        return submit(self, arrays, result, **more)

    monkeypatch.setattr(Session, "submit", noted)
    data = m.Tokens if lora else m.Sentences
    states = [(torch.get_rng_state, torch.set_rng_state)]

    def site(place: Any) -> Any:
        model = m.adapted(m.classifier()) if lora else m.decoder()
        given = {"train_dataset": data(32, place.index), "eval_dataset": data(16, 50 + place.index)}
        m.trainer(FederatedCallback(kit=place.kit), model=model, num_train_epochs=9, **given).train()
        return model

    with LocalFederation(sites=2, rounds=2, cross_site=True, strategy=strategy, states=states) as federation:
        models = federation.run(site)
        federation.result()
        final = federation.model()
    matrix = next(e.data["matrix"] for e in federation.events if e.kind == "cross_site")
    for index, (name, model) in enumerate(models.items()):
        state = TorchState(model)
        own = {key: np.array(array) for key, array in state.get_state().items()}
        assert all(np.array_equal(own[key], array) for key, array in final.items())
        for whose, arrays in {"global": final, **sent}.items():
            state.set_state({**own, **final, **arrays})
            by_hand = m.trainer(None, model=model, eval_dataset=data(16, 50 + index)).evaluate()["eval_loss"]
            assert matrix[whose][name]["loss"] == pytest.approx(by_hand, abs=1e-6)
    assert (len(sent["site-1"]) < len(final)) == (strategy == "rolora")
