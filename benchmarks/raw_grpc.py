"""Reference of the benchmarks: a plain gRPC stream. Every site sends MIB MiB and, once all have, receives MIB MiB.

usage: raw_grpc.py MIB SITES ROUNDS [KITS]

Prints the seconds of every round as a JSON list. KITS is a folder of startup kits, for mutual TLS with the credentials
of `server` and `site-1`.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

FRAME_BYTES = 2 * 2**20
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def frames(data: memoryview) -> Iterator[bytes]:
    for start in range(0, len(data), FRAME_BYTES):
        yield bytes(data[start : start + FRAME_BYTES])


def fill(buffer: np.ndarray[Any, Any], messages: Iterator[bytes]) -> None:
    at = 0
    for message in messages:
        buffer[at : at + len(message)] = np.frombuffer(message, np.uint8)
        at += len(message)


class Exchange(grpc.GenericRpcHandler):
    """Service with one call per site and round: an upload, a barrier for all sites, and a download."""

    def __init__(self, size: int, sites: int) -> None:
        self.buffers = [np.zeros(size, np.uint8) for _ in range(sites)]
        self.free = list(range(sites))
        self.barrier = threading.Barrier(sites)

    def service(self, handler_call_details: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(self.exchange)

    def exchange(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        mine = self.free.pop()
        fill(self.buffers[mine], requests)
        self.barrier.wait()
        yield from frames(self.buffers[mine].data)
        self.free.append(mine)


def credentials(kit: Path) -> tuple[bytes, bytes, bytes]:
    """Authority, key and certificate of a startup kit."""
    ca, key, certificate = ((kit / f"{name}.pem").read_bytes() for name in ("ca", "key", "certificate"))
    return ca, key, certificate


def site(port: int, size: int, rounds: int, barrier: Any, results: Any, kits: str) -> None:
    if kits:
        mine = grpc.ssl_channel_credentials(*credentials(Path(kits, "site-1")))
        options = [*OPTIONS, ("grpc.ssl_target_name_override", "server.fl-adapters.internal")]
        channel = grpc.secure_channel(f"127.0.0.1:{port}", mine, options=options)
    else:
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS)
    call = channel.stream_stream("/raw/Exchange")
    data, seconds = np.zeros(size, np.uint8), []
    barrier.wait()
    for _ in range(rounds):
        began = time.perf_counter()
        fill(data, call(frames(data.data)))
        seconds.append(time.perf_counter() - began)
    results.put(seconds)


def main(mib: float, sites: int, rounds: int, kits: str = "") -> list[float]:
    """Run the exchange. Returns the seconds of each round at its slowest site."""
    size = int(mib * 2**20)
    spawn = multiprocessing.get_context("spawn")
    server = grpc.server(ThreadPoolExecutor(2 * sites), options=OPTIONS)
    server.add_generic_rpc_handlers((Exchange(size, sites),))
    if kits:
        ca, *pair = credentials(Path(kits, "server"))
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([tuple(pair)], ca, True))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    barrier, results = spawn.Barrier(sites), spawn.Queue()
    children = [spawn.Process(target=site, args=(port, size, rounds, barrier, results, kits)) for _ in range(sites)]
    for child in children:
        child.start()
    seconds = [results.get() for _ in children]
    for child in children:
        child.join()
    server.stop(0)
    return [max(each) for each in zip(*seconds, strict=True)]


if __name__ == "__main__":
    print(json.dumps(main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])))
