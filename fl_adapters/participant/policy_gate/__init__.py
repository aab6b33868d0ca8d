"""The policy of a site: which jobs it joins, what may leave it, and a record of both in its audit log."""

from fl_adapters.participant.policy_gate.base import CohortGate, PolicyGate
from fl_adapters.participant.policy_gate.job_rules import job_refusals
from fl_adapters.participant.policy_gate.kit_policy import KitPolicyGate, policy_gate_of
from fl_adapters.participant.policy_gate.reasons import LeaveReason
from fl_adapters.participant.policy_gate.refusals import Refusals

__all__ = ["CohortGate", "KitPolicyGate", "LeaveReason", "PolicyGate", "Refusals", "job_refusals", "policy_gate_of"]
