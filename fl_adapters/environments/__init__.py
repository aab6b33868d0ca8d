"""Environments that a job runs in: `Simulation`, `ProofOfConcept`, `Production`. Each is imported on first use."""
