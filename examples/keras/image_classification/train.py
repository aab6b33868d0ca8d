"""Trains a small convolutional network on images of clothes or of digits: an ordinary Keras script.

python train.py                  # on all images
python train.py --shard 1/4      # on the images of the first of four sites

Prints the accuracy on held-out images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras

from data import ROWS, load
from model import network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Fashion-MNIST's files, or: digits")
    parser.add_argument("--shard", metavar="I/N", help="part to train on, such as 1/4")
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows of all sites together; 0 for all")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="out")
    args = parser.parse_args()

    keras.utils.set_random_seed(args.seed)
    data = load(args.data, args.shard, args.rows)
    model = network(data.train[0].shape[1:])
    model.compile(
        optimizer=keras.optimizers.SGD(0.05, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        *data.train,
        batch_size=32,
        epochs=args.epochs,
        validation_data=data.validation,
        verbose=2,
    )
    Path(args.output).mkdir(parents=True, exist_ok=True)
    model.save(Path(args.output, "model.keras"))

    scores = model.evaluate(*data.test, batch_size=256, verbose=0, return_dict=True)
    print(f"accuracy on {len(data.test[0])} held-out rows: {scores['accuracy']:.4f}")


if __name__ == "__main__":
    main()
