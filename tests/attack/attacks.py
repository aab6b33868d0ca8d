"""All hostile variants."""

from __future__ import annotations

import attacks_by_mail
import attacks_by_server
import attacks_control
import attacks_identity
import attacks_joining
import attacks_on_costs
import attacks_scores
import attacks_states
import attacks_transport
import attacks_updates
from attack_table import Attack

ATTACKS: tuple[Attack, ...] = (
    *attacks_by_mail.ATTACKS,
    *attacks_by_server.ATTACKS,
    *attacks_control.ATTACKS,
    *attacks_joining.ATTACKS,
    *attacks_updates.ATTACKS,
    *attacks_scores.ATTACKS,
    *attacks_states.ATTACKS,
    *attacks_identity.ATTACKS,
    *attacks_transport.ATTACKS,
    *attacks_on_costs.ATTACKS,
)
"""Every variant, by kind: what `make attack` sends."""

QUICK: tuple[Attack, ...] = tuple(attack for attack in ATTACKS[::2] if attack.quick)
"""Every second variant but for the expensive ones: what `make test` sends."""
