"""Commands `fl-adapters job ...`: the jobs of a federation, and simulations to resume."""
