"""How a run goes: synchronous rounds, buffered, swarm, virtual; sampling, scores, cross-site evaluation."""
