"""Keys of secure sums are signed with certificates of startup kits: nobody else's are taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from secure_sums import CONTEXT
from study import Study

from fl_runtime.errors import PermissionDeniedError
from fl_runtime.secure_sum import Context, SiteSums, SumRules
from fl_runtime.trust.streams.kit_signatures import KitSignatures

RULES = SumRules(min_cohort=2)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Study(tmp_path_factory.mktemp("study")).kits


def sums(kits: Path, name: str, context: Context = CONTEXT, attempt: int = 1) -> SiteSums:
    kit = KitSignatures(kits / name)
    return SiteSums(name, context, RULES, kit, kit, attempt=attempt)


def test_signed_keys_are_taken(kits: Path) -> None:
    north, south = sums(kits, "north"), sums(kits, "south")
    publics = {"north": north.public, "south": south.public}
    assert north.begin(1, "update", publics) != south.begin(1, "update", publics)


@pytest.mark.parametrize("case", ["unsigned", "own", "other run", "swapped", "renamed"])
def test_other_keys_are_refused(kits: Path, case: str) -> None:
    north = sums(kits, "north")
    match case:
        case "unsigned":
            forged = SiteSums("south", CONTEXT, RULES).public
        case "own":  # signed by the server's certificate
            fields = json.loads(sums(kits, "south").public)
            fields |= {"certificate": json.loads(north.public)["certificate"]}
            forged = json.dumps(fields).encode()
        case "other run":
            forged = sums(kits, "south", Context("job", "", "run-0")).public
        case "swapped":  # an X25519 key of the server's beside the signature of another
            fields = json.loads(sums(kits, "south").public)
            fields["exchange"] = json.loads(SiteSums("south", CONTEXT, RULES).public)["exchange"]
            forged = json.dumps(fields).encode()
        case _:
            kit = KitSignatures(kits / "north")
            forged = SiteSums("south", CONTEXT, RULES, kit, kit).public
    with pytest.raises(PermissionDeniedError, match="keys of south"):
        north.begin(1, "update", {"north": north.public, "south": forged})


def test_keys_of_an_earlier_process_are_refused(kits: Path) -> None:
    north, first, second = sums(kits, "north"), sums(kits, "south"), sums(kits, "south", attempt=2)
    north.begin(1, "update", {"north": north.public, "south": second.public})
    with pytest.raises(PermissionDeniedError, match="earlier process"):
        north.begin(2, "update", {"north": north.public, "south": first.public})
