"""Provisioning: kits for the participants of a project, and what became of their certificates."""
