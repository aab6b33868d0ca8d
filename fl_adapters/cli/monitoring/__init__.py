"""The pages `/healthz` and `/metrics` of a federation's server, for those who watch it."""
