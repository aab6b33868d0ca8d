"""The error with which a rule of a policy refuses something."""

from __future__ import annotations

from fl_runtime.errors import PermissionDeniedError
from fl_runtime.trust.identity import Identity

POLICY_FILE = "policy.yml"


def denied(
    site: Identity, action: str, rule: str, fix: str = "change the job, or ask the site to change its policy"
) -> PermissionDeniedError:
    """Return the error of a rule.

    Args:
        site: The site whose policy it is.
        action: What the site may not do, as in "may not ...".
        rule: The rule as the file has it, and what does not fit it.
        fix: What to do about it.

    Returns:
        The error.
    """
    return PermissionDeniedError(
        f"{site} may not {action}",
        where=f"rule {rule} (the site's {POLICY_FILE})",
        fix=fix,
    )
