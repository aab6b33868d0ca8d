"""A script: one site that may kill or freeze itself.

usage: xgboost_site_process.py KIT MODE ROUNDS DIES_AT MODEL
"""

from __future__ import annotations

import sys
from pathlib import Path

import xgboost_data as d

import fl_adapters
from fl_adapters.xgboost import train

if __name__ == "__main__":
    kit, mode, rounds, dies_at, model = sys.argv[1:]
    booster = train(
        d.BASE | {"base_score": 0.0},
        d.matrix(fl_adapters.site(kit).index),
        int(rounds),
        obj=d.logistic(int(dies_at)),
        mode=mode,
        kit=kit,
        collective_timeout_s=15,
    )
    Path(model).write_bytes(booster.save_raw("ubj"))
