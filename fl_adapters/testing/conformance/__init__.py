"""The conformance suite: the cases that every adapter must pass."""
