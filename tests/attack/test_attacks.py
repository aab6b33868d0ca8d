"""The quick half of the attack suite; `make attack` sends all of it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from attack import all_outcomes
from attack_table import Attack, Outcome
from attacks import ATTACKS, QUICK


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Outcome]:
    """What came of each variant. All are sent to one federation, whose honest sites must finish undisturbed."""
    return {str(outcome.attack): outcome for outcome in all_outcomes(tmp_path_factory.mktemp("attack"), QUICK)}


@pytest.mark.parametrize("attack", QUICK, ids=str)
def test_an_attacker_gets_a_refusal_and_nobody_else_notices(attack: Attack, outcomes: Mapping[str, Outcome]) -> None:
    outcome = outcomes[str(attack)]
    assert not outcome.fault, outcome.got


def test_every_variant_has_a_name_of_its_own_and_something_that_it_must_get() -> None:
    names = [str(attack) for attack in ATTACKS]
    assert len(set(names)) == len(names) >= 60
    for attack in ATTACKS:
        assert attack.gets and re.compile(attack.gets)
