"""A site's script that trains twice, for tests that kill it: the second training has weights and data of its own."""

from __future__ import annotations

import random

import numpy as np
import restarted_loop

import fl_adapters as fl

if __name__ == "__main__":
    random.seed()  # a process knows nothing of the one before
    np.random.seed()
    index = fl.site().index
    restarted_loop.run(index, epochs=5, keep_local=["head"])
    restarted_loop.run(index + 10, epochs=20, keep_local=["head"])
