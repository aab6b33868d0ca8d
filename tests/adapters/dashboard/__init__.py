"""Tests of the dashboard: a package, so that its browser is closed after the last of them."""
