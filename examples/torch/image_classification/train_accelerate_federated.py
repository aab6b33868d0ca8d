"""Trains the same network with Accelerate, which brings devices, mixed precision, DDP and gradient accumulation.

python train_accelerate.py                       # on all images
accelerate launch train_accelerate.py            # on all devices

Prints the accuracy on held-out images.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from data import ROWS, load
from fl_adapters.torch import FederatedLoop
from model import network, score

ACCUMULATE = 2  # batches of 8 for a step


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
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE)
    data = load(args.data, args.shard, args.rows)
    loader = DataLoader(data.train, batch_size=8, shuffle=True)
    model = network(data.side)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    steps = args.epochs * math.ceil(len(loader) / ACCUMULATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    loop = FederatedLoop(model, optimizer, evaluate=lambda: score(model, data.validation), scheduler=schedule)
    for round in loop.rounds(loader, epochs=args.epochs):
        model.train()
        for images, labels in round:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            round.add_loss(loss)

    if args.output and accelerator.is_main_process:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        accelerator.save(accelerator.unwrap_model(model).state_dict(), Path(args.output) / "model.pt")
    scores, rows = score(model, data.test)
    accelerator.print(f"accuracy on {rows} held-out rows: {scores['accuracy']:.4f}")


if __name__ == "__main__":
    main()
