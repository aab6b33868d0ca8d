"""Conformance suite: the cases that every adapter must pass. `fl_adapters.testing` exports them."""
