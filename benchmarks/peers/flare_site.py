"""FLARE site that adds 1 to every weight. Site-1 writes the time and value of each arriving model to $ARRIVALS."""

from __future__ import annotations

import os
import time

import nvflare.client as flare
from nvflare.app_common.np.constants import NPConstants

flare.init()
first = flare.get_site_name() == "site-1"
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    weights = model.params[NPConstants.NUMPY_KEY]
    if first:
        with open(os.environ["ARRIVALS"], "a") as arrivals:
            arrivals.write(f"{time.time()} {float(weights.flat[-1])}\n")  # FLARE redirects print
    changed = {NPConstants.NUMPY_KEY: weights + 1}
    flare.send(flare.FLModel(params=changed, params_type=flare.ParamsType.FULL, current_round=model.current_round))
