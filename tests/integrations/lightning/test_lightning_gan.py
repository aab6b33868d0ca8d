"""A GAN with two optimizers stepped by hand, as in Lightning's own example, beside a plain loop that averages."""

from __future__ import annotations

from typing import Any

import lightning_models as m
import numpy as np
import torch
from torch import nn

from fl_adapters.lightning import FederatedCallback

ROUNDS, COUNTS = 2, (16, 24)
real_or_not = nn.functional.binary_cross_entropy_with_logits


class Gan(m.package().LightningModule):
    """A generator and a discriminator, trained in turn within one training step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def losses(self, real: torch.Tensor) -> Any:
        """Yield the loss of the generator, and after its step that of the discriminator."""
        noise, ones = real[:, :2], torch.ones(len(real), 1)
        yield real_or_not(self.discriminator(self.generator(noise)), ones)
        fake = self.discriminator(self.generator(noise).detach())
        yield (real_or_not(self.discriminator(real), ones) + real_or_not(fake, 1 - ones)) / 2

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer, loss in zip(self.optimizers(), self.losses(batch[0]), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.discriminator)]


def loader(site: int) -> Any:
    return m.loader(site, COUNTS[site], shuffle=False)


def plain_epoch(gan: Gan, site: int) -> None:
    gan.train()
    for x, _ in loader(site):
        for optimizer, loss in zip(gan.configure_optimizers(), gan.losses(x), strict=True):
            gan.zero_grad()
            loss.backward()
            optimizer.step()


def test_a_gan_equals_a_loop_that_averages_by_hand(federation: Any) -> None:
    run = federation(sites=len(COUNTS), rounds=ROUNDS)

    def site(place: Any) -> dict[str, np.ndarray]:
        gan = Gan()
        m.trainer(FederatedCallback(kit=place.kit), max_epochs=100).fit(gan, loader(place.index))
        return m.weights(gan)

    sites = list(run.run(site).values())
    loops = [Gan() for _ in COUNTS]
    for _ in range(ROUNDS):
        for index, gan in enumerate(loops):
            plain_epoch(gan, index)
        states = [gan.state_dict() for gan in loops]
        mean = {}
        for name, tensor in states[0].items():
            parts = [state[name].double() * count / sum(COUNTS) for state, count in zip(states, COUNTS, strict=True)]
            whole = not tensor.is_floating_point()  # the counter of batches: the maximum
            mean[name] = torch.stack([s[name] for s in states]).amax(0) if whole else sum(parts).float()
        for gan in loops:
            gan.load_state_dict(mean)
    for reached in sites:
        for name, value in m.weights(loops[0]).items():
            np.testing.assert_allclose(reached[name], value, rtol=0, atol=1e-6, err_msg=name)
