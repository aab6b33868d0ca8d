"""Four sites, each alone, together in a federation, and with all data in one place: the same script, passes and tuning.

python demo.py                   # Fashion-MNIST where it is found, else scikit-learn's digits
python demo.py --data digits

Ends with status 1 unless the federation is within two points of the central training and above every site alone.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from data import ROWS, load
from fl_adapters import Job, Simulation

HERE = Path(__file__).resolve().parent
SITES = 4
EPOCHS = {"Fashion-MNIST": 20}
EPOCHS_OF_OTHERS = 60  # the digits are few
ACCURACY = re.compile(r"^accuracy on (\d+) held-out rows of .*: ([0-9.]+)$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Fashion-MNIST's files, or: digits")
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows of all sites together, 0: all")
    parser.add_argument("--epochs", type=int, help="passes over the data, and rounds of the federation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    shares = [load(args.data, f"{i + 1}/{SITES}", args.rows) for i in range(SITES)]
    name = shares[0].name
    epochs = args.epochs or EPOCHS.get(name, EPOCHS_OF_OTHERS)
    given = ["--rows", str(args.rows), "--seed", str(args.seed)] + (["--data", args.data] if args.data else [])
    rows = [len(share.train) for share in shares]
    print(f"{name}, {epochs} passes, accuracy on the same {len(shares[0].test)} held-out rows", flush=True)

    alone = []
    for i in range(SITES):
        alone.append(trained([*given, "--epochs", str(epochs), "--shard", f"{i + 1}/{SITES}"]))
        print(f"  site {i + 1} alone, {rows[i]:5d} rows  {alone[i]:.4f}", flush=True)
    federated = in_federation(given, epochs)
    print(f"  federated, {epochs:3d} rounds      {federated:.4f}", flush=True)
    central = trained([*given, "--epochs", str(epochs)])
    print(f"  all {sum(rows):5d} rows in one    {central:.4f}", flush=True)

    if federated < central - 0.02 or federated <= max(alone):
        sys.exit("the federation is not within two points of the central training, or not above every site")


def trained(arguments: list[str]) -> float:
    """Accuracy of `train.py` with these arguments."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "train.py"), *arguments, "--output", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return accuracy(done.stdout)


def in_federation(arguments: list[str], rounds: int) -> float:
    """Accuracy of the global model of `train_federated.py`, as the first site prints it."""
    job = Job(app=str(HERE / "train_federated.py"), rounds=rounds)
    result = job.run(Simulation(sites=SITES, args=arguments, quiet=True))
    return accuracy((result.folder / "sites" / result.sites[0] / "log.txt").read_text("utf-8"))


def accuracy(output: str) -> float:
    """The accuracy that the script has printed."""
    return float(ACCURACY.findall(output)[-1][1])


if __name__ == "__main__":
    main()
