"""Hostile variants: calls that cost the server more than the attacker, looped at full speed."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from attack_client import MODEL, Attacker
from attack_table import Attack
from attacks_joining import many, tensor

from fl_runtime.errors import FederationError
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

_LOOP_S = 2.0


def looped(work: Callable[[Attacker, int], object], threads: int = 2) -> Callable[[Attacker], object]:
    """Repeat calls without a pause in several threads, and count what they got."""

    def send(attacker: Attacker) -> object:
        got, end = Counter[str](), time.monotonic() + _LOOP_S
        if attacker.name == "greedy":
            attacker.join()
            attacker.register()

        def repeat(first: int) -> None:
            number = first
            while time.monotonic() < end:
                number += threads
                try:
                    work(attacker, number)
                    got["answered"] += 1
                except FederationError as error:
                    got[error.what] += 1

        running = [threading.Thread(target=repeat, args=(n,), daemon=True) for n in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(30)
        return "; ".join(f"{count} x {what[:90]}" for what, count in got.most_common(3))

    return send


def joins(attacker: Attacker, number: int) -> object:
    """Join and register with as much free text as a registration may hold."""
    attacker.join()
    return attacker.register(info={str(n): f"{number}" + "y" * 4000 for n in range(250)})


def registers(attacker: Attacker, number: int) -> object:
    return attacker.register(manifest=_MANY)


def announces(attacker: Attacker, number: int) -> object:
    """Announce 128 MiB beside the weights, of other tensors each time, and send nothing."""
    found = attacker.header()
    found.payload.manifest.tensors.add(name=f"x{number}", dtype="float32", shape=[2**25 - 2**20], extra=True)
    manifest = Manifest.from_proto(found.payload.manifest)
    found.payload.layout, found.payload.total_bytes = manifest.layout, manifest.nbytes
    found.payload.digests = b"d" * 8 * (len(MODEL) + 1)
    return attacker.submit(found)


def scores(attacker: Attacker, number: int) -> object:
    return attacker.score(json.dumps({f"metric {number} {n}" + "x" * 150: n for n in range(1000)}))


def asks(attacker: Attacker, number: int) -> object:
    return attacker.ask("Status", {"x": "y" * 100_000})


def is_denied(attacker: Attacker, number: int) -> object:
    return attacker.ask("SubmitJob", {"job": {"name": "x" * 1000}})


def garbage(attacker: Attacker, number: int) -> object:
    return attacker.call(("Join", "Submit", "Score")[number % 3], b"\xff" * 7_000_000)


def tunnels(attacker: Attacker, number: int) -> object:
    """Send data to another site without asking whether it has room."""
    first = pb.TunnelPart(session=attacker.session).SerializeToString()
    part = pb.TunnelPart(peer="north", stream=f"s{number}", opened="x", data=b"x" * 2**20).SerializeToString()
    call = attacker.begin("Tunnel", [first, *[part] * 200])
    for message in call:
        if pb.TunnelPart.FromString(message).closed:
            break
    call.cancel()
    return None


_MANY = many(0)
_MANY.tensors.extend([tensor(name=f"layer.{n}.weight") for n in range(150_000)])
_A = partial(Attack, "costs", quick=False)
_ANY = "answered|is over its quota"  # the other site has no tunnel, so each stream is closed at once

ATTACKS = (
    _A("streams without credit", "greedy", looped(tunnels), _ANY),
    _A("joining with 1 MB of text", "greedy", looped(joins), "over its quota of registered bytes"),
    _A("registering 150,000 tensors", "greedy", looped(registers, 4), "the sites agreed on has 2|over its quota"),
    _A("announcing 128 MiB", "greedy", looped(announces, 3), "ended after 0 bytes|over its quota"),
    _A("1,000 new metrics a call", "greedy", looped(scores), "different names in this run|over its quota"),
    _A("garbage of 7 MB", "greedy", looped(garbage), "is not a .* message|over its quota"),
    _A("asking for the status", "mina", looped(asks), "over its quota of calls Status"),
    _A("being denied", "mina", looped(is_denied), "may not submit a job|over its quota"),
)
