"""Trains a small convolutional network on images of clothes or of digits: an ordinary Lightning script.

python train.py                  # on all images
python train.py --shard 1/4      # on the images of the first of four sites

Prints the accuracy on held-out images.
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from data import ROWS, load
from fl_adapters.lightning import FederatedCallback
from model import Classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Fashion-MNIST's files, or: digits")
    parser.add_argument("--shard", metavar="I/N", help="part to train on, such as 1/4")
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows of all sites together; 0 for all")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="out")
    args = parser.parse_args()

    pl.seed_everything(args.seed)
    data = load(args.data, args.shard, args.rows)
    module = Classifier(data.side)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=args.epochs,
        default_root_dir=args.output,
        enable_progress_bar=False,
        callbacks=[FederatedCallback()],
    )
    train = DataLoader(data.train, batch_size=16, shuffle=True)
    trainer.fit(module, train, DataLoader(data.validation, batch_size=256))

    (scores,) = trainer.test(module, DataLoader(data.test, batch_size=256), verbose=False)
    print(f"accuracy on {len(data.test)} held-out rows: {scores['test_accuracy']:.4f}")


if __name__ == "__main__":
    main()
