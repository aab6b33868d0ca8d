"""Scripts with several Trainers, and Trainers that train more than once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hf_models import InOrder, Tokens, adapted, classifier, trainer

from fl_adapters.hf import FederatedCallback
from fl_adapters.testing import LocalFederation, Place


def weights(model: Any) -> dict[str, np.ndarray]:
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters() if "lora" in n}


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(left[name], right[name]) for name in left)


def run(work: Any, trainings: int) -> list[dict[str, Any]]:
    states = [(torch.get_rng_state, torch.set_rng_state)]
    with LocalFederation(sites=2, rounds=2, every=2, states=states) as federation:
        results = federation.run(work)
        federation.result()
        assert federation.server.training_count == trainings
        assert [len(federation.server.result(n + 1).rounds) for n in range(trainings)] == [2] * trainings
    return list(results.values())


def made(place: Place, seed: int) -> Any:
    data = InOrder(Tokens(32, seed=10 * seed + place.index))
    return trainer(FederatedCallback(kit=place.kit), model=adapted(classifier(), seed=seed), train_dataset=data)


def test_two_trainers_made_before_either_trains() -> None:
    def work(place: Place) -> Any:
        trainers = [made(place, 1), made(place, 2)]
        for item in trainers:
            item.train()
        return [weights(item.model) for item in trainers]

    first, second = run(work, 2)
    assert same(first[0], second[0]) and same(first[1], second[1]) and not same(first[0], first[1])


def test_one_trainer_that_trains_again_goes_on_from_its_weights() -> None:
    def work(place: Place) -> Any:
        item = made(place, 1)
        item.train()
        between = weights(item.model)
        item.train()
        return between, weights(item.model)

    first, second = run(work, 2)
    assert same(first[0], second[0]) and same(first[1], second[1]) and not same(first[0], first[1])


def test_a_trainer_that_only_evaluates_is_no_training() -> None:
    def work(place: Place) -> Any:
        item = made(place, 1)
        item.train()
        before = weights(item.model)
        evaluated = trainer(FederatedCallback(kit=place.kit), model=item.model, eval_dataset=Tokens(8))
        loss = evaluated.evaluate()["eval_loss"]
        assert same(before, weights(item.model))
        return loss

    first, second = run(work, 1)
    assert first == second


def test_the_head_first_and_then_all_layers() -> None:
    """The second training goes on from the weights of the first, and exchanges more tensors."""

    def work(place: Place) -> Any:
        model = classifier()
        model.bert.requires_grad_(False)
        data = InOrder(Tokens(32, seed=place.index))
        trainer(FederatedCallback(kit=place.kit), model=model, train_dataset=data).train()
        head = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
        model.requires_grad_(True)
        trainer(FederatedCallback(kit=place.kit), model=model, train_dataset=data).train()
        return head, {n: p.detach().numpy().copy() for n, p in model.named_parameters()}

    first, second = run(work, 2)
    untouched = {n: p.detach().numpy() for n, p in classifier().named_parameters()}
    for after_head, after_all in (first, second):
        changed = {n for n in untouched if not np.array_equal(untouched[n], after_head[n])}
        assert changed == {n for n in untouched if n.startswith("classifier.")}
        assert sum(not np.array_equal(after_head[n], after_all[n]) for n in untouched) > len(changed)
    assert same(first[0], second[0]) and same(first[1], second[1])


def test_a_grid_search_over_folds_equals_plain_trainings() -> None:
    """Sites with the same rows learn what one of them learns alone: candidate by candidate, and fold by fold."""
    candidates = [(rate, fold) for rate in (1e-2, 3e-2) for fold in (1, 2)]

    def search(*callbacks: Any) -> list[dict[str, np.ndarray]]:
        found = []
        for rate, fold in candidates:
            data = InOrder(Tokens(16, seed=fold))
            model = adapted(classifier(), seed=fold)
            item = trainer(*callbacks, model=model, train_dataset=data, learning_rate=rate, num_train_epochs=2)
            item.train()
            found.append(weights(item.model))
        return found

    states = [(torch.get_rng_state, torch.set_rng_state)]
    with LocalFederation(sites=2, states=states) as federation:
        trained = federation.run(lambda place: search(FederatedCallback(kit=place.kit)))
        federation.result()
        assert federation.server.training_count == len(candidates)
    alone = search()
    for found in trained.values():
        for got, want in zip(found, alone, strict=True):
            for name in want:
                np.testing.assert_allclose(got[name], want[name], atol=1e-5)
    assert not same(alone[0], alone[1]) and not same(alone[0], alone[2])
