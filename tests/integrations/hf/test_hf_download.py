"""What an admin downloads from a federation's server opens with transformers and PEFT, and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hf_models as m
import numpy as np
import pytest
import st_models as st
import torch
from hf_text_site import trained
from peft import PeftModel
from study import Study, readdressed
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fl_adapters.cli.app import app
from fl_adapters.hf import FederatedCallback
from fl_adapters.participant.kit import Kit

SENTENCES = [str(text) for text in st.pairs(4)["first"]]

SITE = """
from hf_text_site import trained
trained(KIT, *VALUES)
"""
OPENED = f"""
TEXTS = {SENTENCES}
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(VALUES).eval()
inputs = AutoTokenizer.from_pretrained(VALUES)(TEXTS, padding=True, return_tensors="pt")
with torch.no_grad():
    RESULT = model(**inputs).logits.numpy()
"""


def logits(model: Any, tokenizer: Any) -> np.ndarray:
    with torch.no_grad():
        return model(**tokenizer(SENTENCES, padding=True, return_tensors="pt")).logits.numpy()


@pytest.fixture
def study_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Study]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    made: list[Study] = []

    def make(sites: tuple[str, ...] = ("north",)) -> Study:
        made.append(Study(tmp_path / "study", sites))
        made[-1].start()
        made[-1].job(trainings=1)
        return made[-1]

    yield make
    for study in made:
        study.__exit__(None, None, None)


def kit_of(study: Study, site: str) -> str:
    number, count = study.sites.index(site), len(study.sites)
    kit = Kit("job", site, number, count, study.address, "", credentials=str(study.kits / site))
    return str(kit.save(study.folder / "command" / site))


def downloaded(study: Study) -> Path:
    """Fetch the job's results with the command of an admin, and return the folder of the model."""
    assert study.server.wait_for_job("job", 30)
    with pytest.raises(SystemExit) as ended:
        app(["job", "download", "job", "--kit", str(readdressed(study, "ada")), "--out", str(study.folder / "out")])
    assert ended.value.code == 0
    return study.folder / "out" / "model"


def test_two_sites_a_download_and_a_fresh_process_predict_as_a_simulation_does(
    study_of, federation, tmp_path, capfd
) -> None:
    study, base = study_of(("north", "south")), st.base(tmp_path / "base", classifies=True)
    simulated = federation(sites=2)
    work = [(base, 0), (base, 1)]
    sites = [simulated.fork(SITE, w, kit=kit_of(study, site)) for site, w in zip(study.sites, work, strict=True)]
    sites += [simulated.fork(SITE, w, number=number) for number, w in enumerate(work, 1)]
    for site in sites:
        site.result()
    folder = downloaded(study)
    assert "tokenizer.json are those of north" in capfd.readouterr().out
    assert study.server.queue.outcome("job")["files"]["different"] == {}
    opened = simulated.fork(OPENED, str(folder), number=None).result()
    simulated.ended()
    own = AutoModelForSequenceClassification.from_pretrained(simulated.folder / "model").eval()
    assert np.array_equal(opened, logits(own, AutoTokenizer.from_pretrained(simulated.folder / "model")))
    before = BertForSequenceClassification.from_pretrained(base).eval()
    assert not np.allclose(opened, logits(before, st.tokenizer()))


def test_lora_opens_on_its_base(study_of, tmp_path) -> None:
    study, base = study_of(), st.base(tmp_path / "base", classifies=True)
    model = trained(kit_of(study, "north"), base, lora=True)
    folder = downloaded(study)
    loaded = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(base), folder).eval()
    assert np.array_equal(logits(loaded, AutoTokenizer.from_pretrained(folder)), logits(model, st.tokenizer()))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"  # and not where it lies at the site


class Images(torch.utils.data.Dataset):
    """Random images of two classes."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = torch.rand((3, 32, 32), generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels, "labels": index % 2}


def test_a_model_that_transformers_saves_under_other_names_opens_too(study_of) -> None:
    """transformers 5 renames the layers of ViT when it saves them; the server keeps the names of the live model."""
    study = study_of()
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    )
    callback = FederatedCallback(kit=kit_of(study, "north"))
    m.trainer(callback, model=model, train_dataset=Images(), remove_unused_columns=False).train()
    opened = AutoModelForImageClassification.from_pretrained(downloaded(study)).eval()
    pixels = torch.stack([Images()[index]["pixel_values"] for index in range(4)])
    with torch.no_grad():
        assert torch.equal(opened(pixels).logits, model.eval()(pixels).logits)


def test_a_model_of_which_a_part_stays_is_not_made_to_open(study_of, tmp_path, capfd) -> None:
    """from_pretrained would give the frozen embeddings, which do not travel, random values."""
    study = study_of()
    trained(kit_of(study, "north"), st.base(tmp_path / "base", classifies=True), freeze=True)
    assert not (downloaded(study) / "config.json").exists()
    assert "tensors that do not travel (bert.embeddings" in capfd.readouterr().err
    assert (study.kits / "north" / "jobs" / "job" / "model" / "config.json").exists()


def test_nothing_leaves_where_the_policy_is_silent(study_of, tmp_path, capfd) -> None:
    study = study_of()
    policy = study.kits / "north" / "policy.yml"
    policy.write_text(os.linesep.join(line for line in policy.read_text().splitlines() if "share_files:" not in line))
    trained(kit_of(study, "north"), st.base(tmp_path / "base", classifies=True))
    assert sorted(path.name for path in downloaded(study).iterdir()) == ["model.safetensors"]
    assert "stay at this site (no share_files: true in policy.yml)" in capfd.readouterr().err
