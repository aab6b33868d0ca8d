"""The script of the queue's jobs: bare_site.py's work, whose acknowledged rounds stand in the output.

usage: queue_site.py KIB
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from bare_site import initial, trained

import fl_adapters as fl


def main() -> None:
    kib, own = int(sys.argv[1]), {"carried": 0.0}
    Path(os.environ["CHAOS_PROCESSES"], f"{fl.site().name}-{os.getpid()}").touch()
    with fl.connect(required=True) as site:
        for task in site.tasks(initial=initial(kib), save=lambda: own, load=own.update):
            model = {name: np.asarray(array) for name, array in task.arrays.items()}
            update, own["carried"] = trained(model, site.index, task.round, own["carried"])
            task.submit(update, num_examples=site.index + 1)
            print(f"acknowledged {task.round}", flush=True)


if __name__ == "__main__":
    main()
