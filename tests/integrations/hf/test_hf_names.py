"""Labels and tokenizers that differ between sites are refused before the first step, with the entries that differ."""

from __future__ import annotations

from typing import Any

import hf_models as m
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from fl_adapters.hf import FederatedCallback
from fl_adapters.testing import LocalFederation
from fl_runtime.errors import HandshakeError


class Steps(TrainerCallback):
    """Counts steps."""

    made = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.made += 1


def tokenizer(*swapped: int) -> PreTrainedTokenizerFast:
    """A tokenizer of 30,000 words, two of which may be swapped."""
    words = [f"word{i}" for i in range(30_000)]
    if swapped:
        first, second = swapped
        words[first], words[second] = words[second], words[first]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="word0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="word0")


def outcomes(*sites: dict[str, Any], **options: Any) -> tuple[list[BaseException | None], int]:
    """Train a site for each entry; return the errors, and the number of steps that were made."""
    steps = Steps()

    def site(place: Any) -> None:
        given = dict(sites[place.index])
        model = m.classifier()
        if labels := given.pop("labels", None):
            model.config.id2label = dict(enumerate(labels))
            model.config.label2id = {label: i for i, label in enumerate(labels)}
        callback = FederatedCallback(kit=place.kit, **options, **given.pop("options", {}))
        m.trainer(callback, model=model, callbacks=[steps], output_dir=f"out-{place.name}", **given).train()

    with LocalFederation(sites=len(sites), rounds=1, every=1, states=[]) as federation:
        ended = federation.outcomes({place.name: site for place in federation.places}, check=False)
    return [outcome.error for outcome in ended.values()], steps.made


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"labels": ["no", "yes"]}, {"labels": ["yes", "no"]}, "labels of the model: 0: 'no' != 'yes'"),
        (
            {"processing_class": tokenizer()},
            {"processing_class": tokenizer(20_001, 20_002)},
            "vocabulary of the tokenizer: 30000 entries each; 20001: 'word20001' != 'word20002'",
        ),
    ],
    ids=["labels", "vocabulary"],
)
def test_names_that_differ_are_refused_before_the_first_step(first: Any, second: Any, said: str) -> None:
    errors, steps = outcomes(first, second)
    assert steps == 0
    for error in errors:
        assert isinstance(error, HandshakeError)
        assert said in error.what


def test_padding_of_the_last_call_is_no_difference() -> None:
    """As in run_qa.py, where one site's rows come tokenized from the cache of `datasets`."""
    used = tokenizer()
    used.add_special_tokens({"pad_token": "word0"})
    used("word1 word2", padding="max_length", max_length=3, truncation=True)
    state = used.backend_tokenizer.padding, used.backend_tokenizer.truncation
    unused = tokenizer()
    unused.add_special_tokens({"pad_token": "word0"})
    errors, steps = outcomes({"processing_class": used}, {"processing_class": unused})
    assert errors == [None, None] and steps == 2
    assert (used.backend_tokenizer.padding, used.backend_tokenizer.truncation) == state and None not in state


def test_labels_that_one_site_alone_names_are_no_difference() -> None:
    errors, steps = outcomes({"labels": ["no", "yes"]}, {})
    assert errors == [None, None] and steps == 2


def test_other_labels_may_be_meant() -> None:
    errors, steps = outcomes({"labels": ["no", "yes"], "options": {"agree": False}}, {"labels": ["yes", "no"]})
    assert errors == [None, None] and steps == 2


@pytest.mark.parametrize("own", [False, True])
def test_sites_that_train_on_the_same_rows_are_asked_for_their_data(own: bool) -> None:
    def site(place: Any) -> None:
        rows = m.Tokens(32, seed=place.index if own else 0)
        callback = FederatedCallback(kit=place.kit)
        m.trainer(callback, model=m.classifier(), train_dataset=rows, output_dir=f"out-{place.name}").train()

    with LocalFederation(sites=2, rounds=1, states=[(torch.get_rng_state, torch.set_rng_state)]) as federation:
        federation.run(site)
        federation.result()
        hints = [event.data["text"] for event in federation.events if event.kind == "warning"]
    assert len(hints) == (0 if own else 1)
    assert own or "all 2 sites trained on 32 examples, with exactly the same train_loss" in hints[0]
