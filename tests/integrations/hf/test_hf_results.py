"""`model/` is complete: it predicts as it is, whatever kind of trainer and model it comes from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import hf_models as m
import numpy as np
import pytest
import st_models as st
import torch
from study import Study
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    pipeline,
)

from fl_adapters import open_run
from fl_adapters.hf import FederatedCallback
from fl_adapters.participant.kit import Kit
from fl_runtime.errors import ConfigError


class Texts(torch.utils.data.Dataset):
    """Sentences as the tokenizer gives them, without padding."""

    def __init__(self, padded: bool) -> None:
        words, columns = st.tokenizer(), st.pairs()
        self.rows = [
            {**words(text, **({"padding": "max_length"} if padded else {})), "labels": label}
            for text, label in zip(columns["first"], columns["label"], strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def trained_classifier(federation, folder: Path, *, with_tokenizer: bool, collates: bool):
    """Train a classifier loaded from `folder`; return the Trainer and the folder of the run."""
    run = federation(rounds=1)
    model = BertForSequenceClassification.from_pretrained(
        st.base(folder, classifies=True, with_tokenizer=with_tokenizer)
    )
    given = {"data_collator": DataCollatorWithPadding(st.tokenizer())} if collates else {}
    trainer = m.Trainer(
        model=model,
        args=m.arguments(),
        train_dataset=Texts(padded=not collates),
        callbacks=[FederatedCallback(kit=run.kit())],
        **given,
    )
    trainer.train()
    run.ended()
    return trainer, run.folder


def predictions(folder: Path) -> list[float]:
    """What transformers' own pipeline predicts with nothing but this folder."""
    classify = pipeline("text-classification", model=str(folder), device="cpu", top_k=None)
    return [score["score"] for scores in classify(st.pairs(4)["first"]) for score in scores]


def same_predictions(folder: Path, model) -> bool:
    model.eval()
    inputs = st.tokenizer()(st.pairs(4)["first"], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs).logits.softmax(-1).sort(descending=True).values
    return np.allclose(predictions(folder), wanted.flatten(), atol=1e-6)


@pytest.mark.parametrize("collates", [True, False], ids=["the collator's", "that of the base"])
def test_model_without_processing_class_has_a_tokenizer(federation, tmp_path, capsys, collates: bool) -> None:
    trainer, folder = trained_classifier(federation, tmp_path / "base", with_tokenizer=not collates, collates=collates)
    assert same_predictions(folder / "model", trainer.model)
    said = f"model/ gets the tokenizer or processor of {tmp_path / 'base'}" in capsys.readouterr().err
    assert said is not collates


def test_model_whose_tokenizer_nobody_knows_is_announced(federation, tmp_path, capsys) -> None:
    _, folder = trained_classifier(federation, tmp_path / "base", with_tokenizer=False, collates=False)
    assert "model/ has no tokenizer, since the Trainer has no processing_class=" in capsys.readouterr().err
    assert not list((folder / "model").glob("token*"))


def test_adapter_has_the_tokenizer_of_its_base(federation, tmp_path) -> None:
    run = federation(rounds=1)
    base = BertForSequenceClassification.from_pretrained(st.base(tmp_path / "base", classifies=True))
    m.Trainer(
        model=m.adapted(base),
        args=m.arguments(),
        train_dataset=Texts(padded=True),
        callbacks=[FederatedCallback(kit=run.kit())],
    ).train()
    run.ended()
    assert (run.folder / "model" / "adapter_model.safetensors").exists()
    opened, text = AutoTokenizer.from_pretrained(run.folder / "model"), "word1 word7"
    assert opened(text)["input_ids"] == st.tokenizer()(text)["input_ids"]


def test_moved_output_folder_exists(federation) -> None:
    """Scripts write into `args.output_dir`, which the Trainer makes, before and after training (run_qa.py)."""
    run = federation()
    trainer = m.trainer(FederatedCallback(kit=run.kit()), output_dir="out")
    moved = Path(trainer.args.output_dir)
    assert moved == run.folder / "sites" / "site-1" / "out"
    (moved / "predictions.json").write_text("{}")


def test_models_that_sites_save_by_the_same_name_do_not_meet(federation, capsys) -> None:
    run = federation(sites=2)
    trainers = [m.trainer(FederatedCallback(kit=run.kit(n)), model=m.classifier(seed=n)) for n in (1, 2)]
    for trainer in trainers:
        trainer.save_model("my_model")
        trainer.save_model()
    assert not Path("my_model").exists()
    said = capsys.readouterr().err
    assert [said.count(f"site-{n}/my_model: simulated sites share the working directory") for n in (1, 2)] == [1, 1]
    for number, trainer in enumerate(trainers, start=1):
        own = run.folder / "sites" / f"site-{number}"
        for folder in (own / "my_model", own / "out"):
            opened = BertForSequenceClassification.from_pretrained(folder)
            assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), trainer.model.parameters(), strict=True))
    shared = str(run.folder.parent.parent / "elsewhere")
    trainers[0].save_model(shared)
    with pytest.raises(ConfigError, match="site-1 and site-2 would both write"):
        trainers[1].save_model(shared)


def test_alone_a_model_is_saved_where_the_script_says(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    m.trainer(FederatedCallback(), model=m.classifier()).save_model("my_model")
    assert (tmp_path / "my_model" / "model.safetensors").exists()


def test_sentence_transformer(federation, tmp_path) -> None:
    package, datasets = pytest.importorskip("sentence_transformers"), pytest.importorskip("datasets")
    losses = pytest.importorskip("sentence_transformers.losses")
    run = federation(rounds=2)
    model = package.SentenceTransformer(st.base(tmp_path / "base"), device="cpu")
    arguments = m.arguments().to_dict()
    args = package.SentenceTransformerTrainingArguments(**{n: arguments[n] for n in SHARED})
    trainer = package.SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_dict(st.pairs()),
        loss=losses.CosineSimilarityLoss(model),
        callbacks=[FederatedCallback(kit=run.kit())],
    )
    trainer.train()
    run.ended()
    opened = package.SentenceTransformer(str(run.folder / "model"), device="cpu")
    for found in (opened, open_run(run.folder).load()):
        assert np.array_equal(found.encode(["word1 word2"]), model.encode(["word1 word2"]))


def test_cross_encoder(federation, tmp_path) -> None:
    package, datasets = pytest.importorskip("sentence_transformers.cross_encoder"), pytest.importorskip("datasets")
    run = federation(rounds=2)
    model = package.CrossEncoder(st.base(tmp_path / "base"), num_labels=1, device="cpu")
    arguments = m.arguments().to_dict()
    trainer = package.CrossEncoderTrainer(
        model=model,
        args=package.CrossEncoderTrainingArguments(**{n: arguments[n] for n in SHARED}),
        train_dataset=datasets.Dataset.from_dict(st.pairs()),
        callbacks=[FederatedCallback(kit=run.kit())],
    )
    trainer.train()
    run.ended()
    opened, pair = package.CrossEncoder(str(run.folder / "model"), device="cpu"), [("word1 word2", "word3")]
    for found in (opened, open_run(run.folder).load()):
        assert np.array_equal(found.predict(pair), model.predict(pair))


SHARED = "output_dir use_cpu per_device_train_batch_size save_strategy logging_strategy report_to disable_tqdm".split()


class PassesItsOwn(m.Trainer):
    """Gives callbacks a model that is no module, and arguments of its own, from which it sets HF's, as SetFit does."""

    def __init__(self, callback, **given) -> None:
        super().__init__(args=m.arguments(), train_dataset=m.Tokens(32), **given)
        self.passed = SimpleNamespace(output_dir="out", max_steps=-1, num_epochs=(1, 16), classifier_num_epochs=16)
        handler = self.callback_handler

        def call_event(event, args, state, control, **more):
            names = ("optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader", "processing_class")
            objects = {name: getattr(handler, name) for name in names}
            for each in handler.callbacks:
                passed = self.passed if each is callback else args
                getattr(each, event)(passed, state, control, model=object(), **objects, **more)
            return control

        handler.call_event = call_event
        self.add_callback(callback)
        handler.on_init_end(self.args, self.state, self.control)

    def train(self) -> None:
        self.args.output_dir, self.args.num_train_epochs = self.passed.output_dir, self.passed.num_epochs[0]
        super().train()


def test_trainer_that_passes_other_arguments_and_another_model(federation) -> None:
    run = federation(rounds=3)
    trainer = PassesItsOwn(FederatedCallback(kit=run.kit()), model=m.classifier())
    trainer.train()
    assert len(run.ended().rounds) == 3
    assert trainer.passed.num_epochs == (3, 16)
    assert Path(trainer.args.output_dir) == run.folder / "sites" / "site-1" / "out"
    opened = BertForSequenceClassification.from_pretrained(run.folder / "model")
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), trainer.model.parameters(), strict=True))


def test_setfit(federation, tmp_path) -> None:
    """Its model is no module, and its callbacks get other arguments than those of its trainer."""
    setfit = pytest.importorskip("setfit", reason="setfit is not a dependency of ours")
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegression

    run = federation(rounds=3)
    body = SentenceTransformer(st.base(tmp_path / "base"), device="cpu")
    texts = {"text": st.pairs()["first"], "label": st.pairs()["label"]}
    trainer = setfit.Trainer(
        model=setfit.SetFitModel(model_body=body, model_head=LogisticRegression()),
        args=setfit.TrainingArguments("out", batch_size=64, report_to="none", show_progress_bar=False),
        train_dataset=Dataset.from_dict(texts),
        callbacks=[FederatedCallback(kit=run.kit())],
    )
    with pytest.warns(UserWarning, match="head of this SetFit model"):
        trainer.train()
    run.ended()
    assert Path(trainer.args.output_dir) == run.folder / "sites" / "site-1" / "out"
    opened = SentenceTransformer(str(run.folder / "model"), device="cpu")
    assert np.array_equal(opened.encode(["word1 word2"]), body.encode(["word1 word2"]))
    assert trainer.model.predict(["word1 word2"]) is not None


def test_a_site_of_a_real_federation_has_a_model_that_from_pretrained_opens(tmp_path: Path) -> None:
    """Without `--results`: in the site's folder of the job. Equal to what the trainer holds."""
    with Study(tmp_path, ("north",)) as study:
        study.job(trainings=1, rounds=1)
        kit = Kit("job", "north", 0, 1, study.address, "", credentials=str(study.kits / "north"))
        trainer = m.trainer(FederatedCallback(kit=str(kit.save(tmp_path / "command"))), model=m.classifier())
        trainer.train()
        assert study.server.wait_for_job("job", 30)
        folder = study.kits / "north" / "jobs" / "job" / "model"
        opened = AutoModelForSequenceClassification.from_pretrained(folder)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
