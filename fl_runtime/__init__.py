"""The shared runtime beneath every adapter: transport, journal, aggregation. Knows no training framework."""
