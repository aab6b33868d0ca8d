"""A function with a Trainer, defined in a cell of a real kernel, is run by a site, and its model opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("ipykernel")
from notebook_kernel import run_cells

from fl_adapters import open_run

CELLS = (
    """
import numpy as np
from fl_adapters import Job, Simulation

SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
""",
    """
def rows():
    return [{"input_ids": np.arange(4) + index, "labels": index % 2} for index in range(8)]


def train():
    import torch
    from fl_adapters.hf import FederatedCallback
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES))
    arguments = TrainingArguments("out", use_cpu=True, report_to=[], disable_tqdm=True)
    Trainer(model, arguments, train_dataset=rows(), callbacks=[FederatedCallback()]).train()
    with torch.no_grad():
        np.save("logits.npy", model.eval()(torch.arange(4)[None]).logits.numpy())
""",
    "result = Job(app='notebook', name='notebook', rounds=2).run(Simulation(sites=1, script=train))",
)


def test_a_trainer_of_a_cell_trains_at_a_site(tmp_path: Path) -> None:
    run_cells(tmp_path, CELLS)
    model = open_run(tmp_path / "runs" / "notebook").load()
    with torch.no_grad():
        logits = model(torch.arange(4)[None]).logits.numpy()
    np.testing.assert_allclose(logits, np.load(tmp_path / "logits.npy"), rtol=1e-5, atol=1e-8)
