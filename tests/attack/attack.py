"""The attack suite: hostile variants against one federation, whose honest sites must end as if there were none.

Prints what each attacker got. Exits with status 1 if a variant got anything else than it must, or if anybody but the
attacker noticed.

usage: PYTHONPATH=tests/_support:tests/attack python tests/attack/attack.py [--kind KIND] [--quick]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from attack_federation import Federation, HonestJob, tried
from attack_server import HostileServer
from attack_table import Attack, Outcome
from attacks import ATTACKS, QUICK

from fl_runtime.transport.tls_setting import only_tls_1_3

GROWTH_BYTES = 300 * 2**20
"""How far the server's memory may grow above its peak in the same job without attackers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kind", choices=sorted({attack.kind for attack in ATTACKS}), help="attacks of this kind alone"
    )
    parser.add_argument("--quick", action="store_true", help="the attacks of `make test` alone")
    args = parser.parse_args()
    only_tls_1_3()
    chosen = [attack for attack in (QUICK if args.quick else ATTACKS) if args.kind in (None, attack.kind)]
    began, outcomes = time.monotonic(), list[Outcome]()
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        for outcome in all_outcomes(Path(folder), chosen):
            outcomes.append(outcome)
            show(outcome)
    succeeded = [outcome for outcome in outcomes if outcome.fault]
    kinds = Counter(outcome.attack.kind for outcome in outcomes)
    print(
        f"{len(outcomes)} attacks in {time.monotonic() - began:.0f} s:", *(f"{n} {kind}" for kind, n in kinds.items())
    )
    if succeeded:
        sys.exit(f"{len(succeeded)} SUCCEEDED: " + ", ".join(str(outcome.attack) for outcome in succeeded))
    print("Each got what it must. Every honest site finished its job with the bits of a job without attackers.")


def all_outcomes(folder: Path, attacks: Sequence[Attack]) -> Iterator[Outcome]:
    """Send the variants, and yield what came of each.

    Raises:
        AssertionError: The honest sites did not finish as if there had been no attacker, or the server's memory grew.
    """
    yield from elsewhere(folder, [attack for attack in attacks if attack.phase == "apart"])
    with Federation(folder) as federation:
        for attack in attacks:
            if attack.phase == "idle":
                yield tried(attack, federation.attacker(attack.who))
        yield from besieged(federation, [attack for attack in attacks if attack.phase == "run"])


def elsewhere(folder: Path, attacks: Sequence[Attack]) -> Iterator[Outcome]:
    """Send the variants that need no server of the federation: those of a hostile server, and those by mail."""
    with ExitStack() as things:
        server = HostileServer(folder / "hostile")
        things.callback(server.close)
        for number, attack in enumerate(attacks):
            letters = folder / f"letter-{number}"
            letters.mkdir()
            yield tried(attack, server if attack.who == "server" else letters)


def besieged(federation: Federation, attacks: Sequence[Attack]) -> Iterator[Outcome]:
    """Run a job without attackers, then the same job with a variant in each round, and compare all models."""
    rounds = max(len(attacks), 1)
    quiet = HonestJob(federation, "quiet", rounds)
    for _ in range(rounds):
        with quiet.round():
            pass
    wanted = quiet.finish()
    quiet_bytes = federation.memory.peak_bytes
    siege = HonestJob(federation, "siege", rounds)
    for number in range(1, rounds + 1):
        with siege.round():
            outcome = attacked(federation, attacks[number - 1], number) if attacks else None
        if outcome is not None:
            yield outcome if same(siege.models[-1], quiet.models[number]) else spoilt(outcome)
    assert same(siege.finish(), wanted), "the honest sites have got another model than without attackers"
    grown = federation.memory.peak_bytes - quiet_bytes
    print(f"The server's memory: {quiet_bytes / 2**20:.0f} MiB without attackers, {grown / 2**20:+.0f} MiB with them.")
    assert grown < GROWTH_BYTES, f"the server's memory has grown by {grown / 2**20:.0f} MiB"


def attacked(federation: Federation, attack: Attack, number: int) -> Outcome:
    """Send a variant while a round is open. The attacker leaves the job afterwards, so that the round can close."""
    attacker = federation.attacker(attack.who)
    attacker.round = number
    try:
        return tried(attack, attacker)
    finally:
        attacker.give_up()


def same(one: object, other: object) -> bool:
    assert isinstance(one, dict) and isinstance(other, dict)
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def spoilt(outcome: Outcome) -> Outcome:
    return Outcome(outcome.attack, outcome.got, "the honest sites have got another model than without the attacker")


def show(outcome: Outcome) -> None:
    got = " ".join(outcome.got.split())
    who, name = outcome.attack.who, str(outcome.attack)
    print(f"{'FAILED' if outcome.fault else 'ok':6} {who:8} {name:58.58} {got:.110}", flush=True)
    if outcome.fault:
        print(f"       {outcome.fault}", flush=True)


if __name__ == "__main__":
    main()
