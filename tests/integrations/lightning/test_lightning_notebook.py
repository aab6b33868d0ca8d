"""A function with a Trainer of Lightning, defined in a cell of a real kernel, is run by a site, and its model opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("ipykernel")
from notebook_kernel import run_cells

from fl_adapters import open_run

CELLS = (
    """
import lightning as L
import numpy as np
import torch
from fl_adapters import Job, Simulation
from fl_adapters.lightning import FederatedCallback

INPUTS = 4
""",
    """
class Line(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(INPUTS, 1)

    def training_step(self, batch, number):
        rows, wanted = batch
        return torch.nn.functional.mse_loss(self.layer(rows), wanted)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def rows():
    made = torch.randn(16, INPUTS, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(made, made.sum(1, keepdim=True)), batch_size=8)
""",
    """
def train():
    L.seed_everything(0)
    module = Line()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[FederatedCallback()],
    )
    trainer.fit(module, rows())
    np.savez("layer.npz", **{name: value.numpy() for name, value in module.layer.state_dict().items()})
""",
    "result = Job(app='notebook', name='notebook', rounds=2).run(Simulation(sites=1, script=train))",
)


def alone() -> nn.Linear:
    """What a plain loop of PyTorch makes of the same two epochs."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 1)
    made = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):
        for rows in made.split(8):
            optimizer.zero_grad()
            nn.functional.mse_loss(layer(rows), rows.sum(1, keepdim=True)).backward()
            optimizer.step()
    return layer


def test_a_trainer_of_a_cell_trains_at_a_site(tmp_path: Path) -> None:
    run_cells(tmp_path, CELLS)
    trained = np.load(tmp_path / "layer.npz")
    module = nn.ModuleDict({"layer": nn.Linear(4, 1)})
    opened = open_run(tmp_path / "runs" / "notebook").load(into=module)
    for name, wanted in alone().state_dict().items():
        np.testing.assert_allclose(trained[name], wanted.numpy(), rtol=1e-6)
        np.testing.assert_array_equal(opened["layer"].state_dict()[name].numpy(), trained[name])
