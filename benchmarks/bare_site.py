"""Site script of the benchmarks: adds 1 to every weight of a model of MIB MiB, without training.

usage: bare_site.py MIB
"""

import sys

import numpy as np

import fl_adapters as fl

with fl.connect(required=True) as site:
    for task in site.tasks(initial={"w": np.zeros(int(float(sys.argv[1]) * 2**18), np.float32)}):
        weights = task.arrays["w"]
        weights += 1
        task.submit({"w": weights}, num_examples=1)
