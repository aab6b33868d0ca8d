"""A user's own training loop whose state carries over from round to round; also a script for a site's process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

import fl_adapters as fl
from fl_runtime.types import Arrays

ROWS, BATCH = 24, 4


class Training:
    """Linear regression in two layers, of which one may stay at the site.

    It has momentum, a falling learning rate, shuffled batches and input dropout: every number depends on all before it.
    """

    def __init__(self, site: int) -> None:
        rng = np.random.default_rng(site)
        self.x, self.y = rng.normal(size=(ROWS, 3)), rng.normal(size=ROWS)
        self.weights = {"body": rng.normal(size=(3, 2)), "head": rng.normal(size=2)}
        self.momentum = {name: np.zeros_like(array) for name, array in self.weights.items()}
        self.steps = 0

    def epoch(self) -> None:
        order = np.random.permutation(ROWS)
        for rows in order.reshape(-1, BATCH):
            x = self.x[rows] * (np.random.random((BATCH, 3)) > 0.2)
            hidden = x @ self.weights["body"]
            error = hidden @ self.weights["head"] - self.y[rows] + random.gauss(0, 0.01)
            gradients = {"body": x.T @ np.outer(error, self.weights["head"]), "head": hidden.T @ error}
            self.steps += 1
            for name, gradient in gradients.items():
                self.momentum[name] = 0.9 * self.momentum[name] + gradient / BATCH
                self.weights[name] = self.weights[name] - 0.05 / self.steps**0.5 * self.momentum[name]

    def save(self) -> dict[str, Any]:
        return {"weights": self.weights, "momentum": self.momentum, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        self.weights, self.momentum, self.steps = state["weights"], state["momentum"], state["steps"]


def run(site: int, epochs: int = 1, **options: Any) -> Arrays:
    """Take part in the federation, and return this site's weights at the end."""
    training = Training(site)
    with fl.connect(**options) as place:
        for task in place.tasks(initial=training.weights, save=training.save, load=training.load):
            training.weights |= {name: np.array(array) for name, array in task.arrays.items()}
            for _ in range(epochs):
                training.epoch()
            task.submit(training.weights, num_examples=ROWS + site, local_steps=epochs * ROWS // BATCH)
        return training.weights | dict(place.arrays)


if __name__ == "__main__":
    random.seed()  # a process knows nothing of the one before
    np.random.seed()
    run(fl.site().index, epochs=20, keep_local=["head"])
