"""Label names, tokenizers and preprocessing are found in the objects of the frameworks themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fl_adapters import HandshakeError
from fl_adapters.testing import LocalFederation
from fl_adapters.torch import FederatedLoop
from fl_adapters.torch.handshake.names import labels_of_config, names_held_by, names_of_data, names_of_processing
from fl_runtime.wire.names import Names, ordered


def entries(found: dict[str, Names]) -> dict[str, list[str]]:
    return {name: list(names.entries) for name, names in found.items()}


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({0: "cat", 1: "dog"}, ["cat", "dog"]),
        ({"1": "dog", "0": "cat"}, ["cat", "dog"]),
        ({"dog": 1, "cat": 0}, ["cat", "dog"]),
        ({0: "background", 7: "spleen"}, ["0 = background", "7 = spleen"]),
        (("cat", "dog"), ["cat", "dog"]),
        (["cat", "dog", "cat"], []),  # labels of rows
        ([0.5, 0.5], []),
        ({"cat": 0.5}, []),
        ({}, []),
        (None, []),
        ("cat", []),
        (torch.zeros(3), []),
    ],
)
def test_names_are_put_in_the_order_of_their_numbers(value: Any, names: list[str]) -> None:
    assert ordered(value) == names


def test_labels_that_the_user_has_not_named_are_left_out() -> None:
    config = pytest.importorskip("transformers").BertConfig
    assert entries(labels_of_config(config(num_labels=3))) == {}
    named = config(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}, problem_type="regression")
    assert entries(labels_of_config(named)) == {
        "labels of the model": ["no", "yes"],
        "label2id of the model": ["no", "yes"],
        "problem_type of the model": ["regression"],
    }
    assert labels_of_config(nn.Linear(2, 2)) == {}


def tokenizer(*, lowercase: bool, words: tuple[str, ...] = ("quick", "brown", "fox", "Brown")) -> Any:
    """A tokenizer of `transformers` for a few words."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(("[UNK]", "[PAD]", *words))}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if lowercase:
        made.normalizer = tokenizers.normalizers.Lowercase()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


def test_a_tokenizer_tells_vocabulary_special_tokens_and_how_it_splits() -> None:
    found, lower = (entries(names_of_processing(tokenizer(lowercase=low))) for low in (False, True))
    assert found["vocabulary of the tokenizer"] == ["[UNK]", "[PAD]", "quick", "brown", "fox", "Brown"]
    assert found["pad_token of the tokenizer"] == ["[PAD]"]
    (probe,) = [name for name in found if name.startswith("tokens of ")]
    assert found[probe] != lower[probe]
    assert {name for name in found if found[name] != lower[name]} == {probe}
    assert entries(names_of_processing(SimpleNamespace(tokenizer=tokenizer(lowercase=True)))) == lower
    assert names_of_processing(None) == {}


def test_preprocessing_of_images_is_compared() -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], size={"height": 8, "width": 8})
    (lines,) = entries(names_of_processing(processor)).values()
    assert "image_mean = [0.1, 0.2, 0.3]" in lines
    assert any(line.startswith("size = ") and '"height": 8' in line for line in lines)


def test_columns_of_datasets_tell_their_labels() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "PER"])),
        }
    )
    data = datasets.Dataset.from_dict({"text": ["a"], "label": [1], "tags": [[0]]}, features=features)
    wanted = {"labels of the column 'label'": ["neg", "pos"], "labels of the column 'tags'": ["O", "PER"]}
    assert entries(names_of_data(data)) == wanted
    assert entries(names_of_data({"first": data})) == wanted


def folder(*classes: str) -> Any:
    """A data set as torchvision's ImageFolder makes it of the folders that there are."""
    rows = [(torch.randn(4), torch.tensor(0)) for _ in range(8)]
    return type("Folder", (list,), {"classes": [*classes], "class_to_idx": {c: i for i, c in enumerate(classes)}})(rows)


def test_classes_are_found_in_subsets_and_concatenations() -> None:
    wanted = {"classes of the training data": ["cat", "dog"]}
    data = folder("cat", "dog")
    subset = torch.utils.data.Subset(data, range(2))
    assert entries(names_of_data(data)) == entries(names_of_data(subset)) == wanted
    assert entries(names_of_data(torch.utils.data.ConcatDataset([subset, subset]))) == wanted
    assert names_of_data(torch.utils.data.TensorDataset(torch.zeros(2))) == {}
    assert names_of_data(None) == {}


def test_what_a_module_holds_is_found_without_running_its_properties() -> None:
    class Module(nn.Module):
        label_names = ("no", "yes")

        def __init__(self) -> None:
            super().__init__()
            self.hparams = {"num_classes": 2, "lr": 0.1, "label_smoothing": 0.1, "class_weights": [0.3, 0.7]}

        @property
        def classes(self) -> Any:
            raise AssertionError("a property was evaluated")

    found = entries(names_held_by(Module(), "the module"))
    assert found == {"num_classes of the module": ["2"], "label_names of the module": ["no", "yes"]}
    assert names_held_by(None, "the datamodule") == {}


def test_a_missing_folder_at_one_site_is_refused_before_the_first_step() -> None:
    stepped = []

    def site(place: Any) -> None:
        data = folder(*("cat", "dog", "fox") if place.index else ("cat", "fox"))
        model = nn.Linear(4, 3)
        loop = FederatedLoop(model, torch.optim.SGD(model.parameters(), lr=0.1), kit=place.kit)
        for batches in loop.rounds(torch.utils.data.DataLoader(data, batch_size=4)):
            stepped.append(place.name)
            list(batches)

    with LocalFederation(sites=2, rounds=1) as federation:
        outcomes = federation.outcomes({place.name: site for place in federation.places}, check=False)
    assert not stepped
    for outcome in outcomes.values():
        assert isinstance(outcome.error, HandshakeError)
        assert "classes of the training data: 2 entries != 3 entries; 1: 'fox' != 'dog'" in outcome.error.what
