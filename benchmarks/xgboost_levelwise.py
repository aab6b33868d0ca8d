"""Measures a tree in mode levelwise, plain and masked, beside the ring of mode histogram, near the server and far off.

Sites are processes. Data are random, or the first rows of Adult, divided evenly. Each site reaches the server through a
proxy on the loopback that delays every byte by half of the round trip in each direction.

    python benchmarks/xgboost_levelwise.py [--sites 5] [--depth 6] [--trees 8] [--rows 5000] [--columns 14]
        [--round-trip-ms 0 20] [--adult FOLDER]

Columns: round trip that the proxy adds; median seconds of a tree in each mode. It ends with status 1 if the trees of
the sites differ, or those of levelwise with and without masks.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import queue
import socket
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xgboost
from rich.console import Console
from rich.table import Table

from fl_adapters.participant.kit import read_kit
from fl_adapters.testing import LocalFederation
from fl_adapters.xgboost import train

PARAMS = {"objective": "binary:logistic", "tree_method": "hist", "nthread": 1, "base_score": 0.5, "max_bin": 64}
KINDS = (
    ("histogram (ring)", "histogram", False),
    ("levelwise", "levelwise", False),
    ("levelwise, masked", "levelwise", True),
)


class DelayingProxy:
    """Forwards TCP connections to a target, and every byte later than it came."""

    def __init__(self, target: str, delay_s: float) -> None:
        self._target, self._delay_s = target, delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> DelayingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        host, _, port = self._target.rpartition(":")
        with suppress(OSError):
            while True:
                site, _ = self._listener.accept()
                server = socket.create_connection((host, int(port)))
                for one in (site, server):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for source, sink in ((site, server), (server, site)):
                    held: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                    threading.Thread(target=self._take, args=(source, held), daemon=True).start()
                    threading.Thread(target=self._pass_on, args=(held, sink), daemon=True).start()

    def _take(self, source: socket.socket, held: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        data = b"first"
        while data:
            try:
                data = source.recv(2**16)
            except OSError:
                data = b""
            held.put((time.monotonic() + self._delay_s, data))

    def _pass_on(self, held: queue.SimpleQueue[tuple[float, bytes]], sink: socket.socket) -> None:
        with suppress(OSError):
            while True:
                due, data = held.get()
                time.sleep(max(due - time.monotonic(), 0.0))
                if not data:
                    break
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


def site(index: int, kit: str, mode: Any, args: Any, answers: Any) -> None:
    """Run one site. Durations begin after the first tree, before which sites agree on bins and start workers."""
    times: list[float] = []

    class Clock(xgboost.callback.TrainingCallback):
        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            times.append(time.perf_counter())
            return False

    data = xgboost.DMatrix(*rows_of(index, args))
    params = {**PARAMS, "max_depth": args.depth}
    booster = train(params, data, args.trees, mode=mode, kit=kit, callbacks=[Clock()])
    answers.put((float(np.median(np.diff(times))), hashlib.sha256(booster.save_raw("ubj")).hexdigest()))


def rows_of(index: int, args: Any) -> tuple[Any, Any]:
    """Return the features and labels of a site."""
    if not args.adult:
        draw = np.random.default_rng(index)
        x = draw.normal(size=(args.rows, args.columns)).astype(np.float32)
        return x, (x[:, 0] * x[:, 1] + x[:, 2] > 0).astype(int)
    table = pd.read_csv(args.adult / "adult_train.csv.gz")
    codes = table.apply(lambda column: column if column.dtype.kind in "if" else column.astype("category").cat.codes)
    mine = codes.iloc[index * args.rows : (index + 1) * args.rows]
    return mine.drop(columns="income").to_numpy(np.float32), mine["income"].to_numpy()


def measure(mode: str, masked: bool, round_trip_s: float, args: Any) -> tuple[float, str]:
    """Return the median seconds of a tree, and a digest of the model."""
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = stack.enter_context(LocalFederation(sites=args.sites, sockets=True, folder=folder, secure_sum=masked))
        processes = []
        for place in run.places:
            kit = read_kit(place.kit)
            proxy = stack.enter_context(DelayingProxy(kit.server, round_trip_s / 2))
            far = replace(kit, server=proxy.address).save(Path(place.kit).with_name("far-kit"))
            processes.append(spawn.Process(target=site, args=(place.index, str(far), mode, args, answers)))
        for process in processes:
            process.start()
        found = [answers.get(timeout=600) for _ in processes]
        for process in processes:
            process.join()
        run.result()
    models = {model for _, model in found}
    if len(models) > 1:
        raise SystemExit(f"the sites have different trees in mode {mode}")
    return statistics.median(seconds for seconds, _ in found), models.pop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--trees", type=int, default=8)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--columns", type=int, default=14)
    parser.add_argument("--round-trip-ms", type=float, nargs="+", default=[0, 20])
    parser.add_argument("--adult", type=Path, help="folder of adult_train.csv.gz")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    table = Table(
        title=f"a tree of depth {args.depth}, {args.sites} sites{', Adult' if args.adult else ''}: median seconds"
    )
    for column in ("round trip, ms", *(name for name, _, _ in KINDS)):
        table.add_column(column, justify="right")
    for milliseconds in args.round_trip_ms:
        found = [measure(mode, masked, milliseconds / 1e3, args) for _, mode, masked in KINDS]
        if found[1][1] != found[2][1]:
            raise SystemExit("masks have changed the trees")
        table.add_row(f"{milliseconds:g}", *(f"{seconds:.2f}" for seconds, _ in found))
    Console().print(table)


if __name__ == "__main__":
    main()
