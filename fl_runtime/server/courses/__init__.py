"""Courses, that is how a run proceeds: synchronous rounds, buffered, swarm, virtual; and the parts that they share."""
