"""Trains a small convolutional network on images of clothes or of digits: an ordinary PyTorch loop.

python train.py                  # on all images
python train.py --shard 1/4      # on the images of the first of four sites

Prints the accuracy on held-out images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from data import ROWS, load
from model import network, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Fashion-MNIST's files, or: digits")
    parser.add_argument("--shard", metavar="I/N", help="part to train on, such as 1/4")
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows of all sites together; 0 for all")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder to save the weights in")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    data = load(args.data, args.shard, args.rows)
    loader = DataLoader(data.train, batch_size=16, shuffle=True)
    model = network(data.side)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))

    for _ in range(args.epochs):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()

    if args.output:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), Path(args.output) / "model.pt")
    scores, rows = score(model, data.test)
    print(f"accuracy on {rows} held-out rows: {scores['accuracy']:.4f}")


if __name__ == "__main__":
    main()
