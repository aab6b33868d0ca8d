"""What a site's policy.yml allows."""

from fl_runtime.trust.policy.refusal import POLICY_FILE
from fl_runtime.trust.policy.rules import Policy, PolicyFile, Resources, read_policy
from fl_runtime.trust.policy.template import TEMPLATE

__all__ = ["POLICY_FILE", "TEMPLATE", "Policy", "PolicyFile", "Resources", "read_policy"]
