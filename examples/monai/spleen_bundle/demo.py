"""Shows what a federation of four sites gains when they train a MONAI bundle together.

python demo.py                   # on hippocampus volumes if they are found, else on generated ones
python demo.py --data made

Prints the Dice score of each site alone, of the federation, and of training on all data in one place, on the same
held-out volumes. Ends with status 1 unless the federation is within 0.02 of central and above every site alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))

from comparison import Score, show  # noqa: E402
from data import CENTRAL, HELD_OUT, SITES, TEST, bundle, prepare  # noqa: E402
from fl_adapters import Job, Simulation  # noqa: E402

ROUNDS = 80
AT_ONCE = 2  # trainings without a federation that run in parallel


@dataclass(frozen=True)
class Setting:
    """What all trainings have in common.

    Attributes:
        bundle: Folder of the bundle.
        files: Configuration files.
        folder: Folder with the volumes, in a folder for each site.
        rounds: Number of rounds, and of epochs without a federation.
        seed: Seed of the training.
    """

    bundle: Path
    files: list[str]
    folder: Path
    rounds: int
    seed: int

    @property
    def arguments(self) -> list[str]:
        """Arguments of `monai.bundle run`, which the federated command takes too."""
        return ["--config_file", str(self.files), "--initialize", f"['$monai.utils.set_determinism({self.seed})']"]


def compare(
    console: Console, *, seed: int, data: str | None = None, bundle_folder: str | None = None, rounds: int = ROUNDS
) -> list[Score]:
    """Train in all three ways and return the Dice scores: each site alone, "federated", "central"."""
    folder = Path("runs", "volumes").resolve()  # stays, so that the run can be repeated
    shutil.rmtree(folder, ignore_errors=True)
    sizes = prepare(folder, data)
    root = bundle(bundle_folder)
    files = [str(file) for file in sorted((root / "configs").glob("train.*"))]
    if root.name != "small_bundle":
        files.append(str(HERE / "hippocampus.json"))  # fits the bundle, made for large CT, to these volumes
    setting = Setting(root, files, folder, rounds, seed)
    console.rule(f"The federation: {rounds} rounds at {SITES} sites")
    run = federated(setting)
    console.rule("For comparison: the same bundle without a federation")
    sites = [f"site-{i}" for i in range(1, SITES + 1)]
    longest_first = sorted([CENTRAL, *sites], key=lambda name: -sizes[name])
    with ThreadPoolExecutor(AT_ONCE) as pool, console.status("training ..."):
        trained = list(pool.map(lambda name: alone(setting, name, run, console), longest_first))
    models = {**dict(zip(longest_first, trained, strict=True)), "federated": run / "best" / "model.pt"}
    scores = []
    with console.status("scoring on the held-out volumes ..."):
        for name in (*sites, "federated", CENTRAL):
            label = f"{name} alone" if name in sites else name
            size = sizes[CENTRAL if name == "federated" else name]
            scores.append(Score(label, size, dice(setting, models[name]), models[name].parent))
    return scores


def federated(setting: Setting) -> Path:
    """Run the federation. Returns its folder. The best round has the highest Dice on the sites' validation volumes."""
    job = Job(
        app="fl_adapters.monai",
        rounds=setting.rounds,
        optimizer_state="average",
        best_metric="mean_dice",
        best_mode="max",
    )
    data = f"$'{setting.folder}/' + @federated_site.name"
    arguments = ["run", str(setting.bundle), *setting.arguments, "--dataset_dir", data]
    return job.run(Simulation(sites=SITES, module=True, args=arguments)).folder


def alone(setting: Setting, name: str, run: Path, console: Console) -> Path:
    """Train with MONAI's own command. Returns the checkpoint with the highest Dice on the validation volumes."""
    out, began = run / "comparison" / name, time.monotonic()
    out.mkdir(parents=True)
    own = ["--dataset_dir", str(setting.folder / name), "--bundle_root", str(out), "--epochs", str(setting.rounds)]
    command = [sys.executable, "-m", "monai.bundle", "run", *setting.arguments, *own]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // AT_ONCE))}
    with (out / "log.txt").open("w") as log:
        environment = {**threads, **os.environ}
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if status:
        sys.exit(f"the bundle failed for {name}, see {out / 'log.txt'}")
    console.print(f"{name}: {time.monotonic() - began:.0f} s", highlight=False)
    return out / "models" / "model.pt"


def dice(setting: Setting, model: Path) -> float:
    """Mean Dice on the held-out volumes, from the bundle's own evaluator."""
    logging.disable(logging.ERROR)  # MONAI logs every file that it reads
    with redirect_stdout(sys.stderr):
        import torch
        from monai.bundle import ConfigWorkflow
    override: dict[str, Any] = {
        "dataset_dir": str(setting.folder / TEST),
        "validate#dataset#data": "$[{'image': i, 'label': l} for i, l in zip(@images, @labels)]",
        "validate#handlers": [],
    }
    workflow = ConfigWorkflow(config_file=setting.files, logging_file=False, **override)
    workflow.initialize()
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):  # its progress bars would break ours
        evaluator = workflow.evaluator
        evaluator.network.load_state_dict(torch.load(model, weights_only=True))
        evaluator.run()
    return float(evaluator.state.metrics["val_mean_dice"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the hippocampus data (decathlon format), or: made")
    parser.add_argument("--bundle", help="folder of the spleen bundle")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="rounds, each a pass over the data (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console, began = Console(), time.monotonic()
    scores = compare(console, seed=args.seed, data=args.data, bundle_folder=args.bundle, rounds=args.rounds)
    console.print(f"{time.monotonic() - began:.0f} s in total.")
    title = f"{bundle(args.bundle).name}: Dice on the same {HELD_OUT} held-out volumes"
    show(scores, title, "Dice", console)


if __name__ == "__main__":
    main()
