"""The runtime below all adapters: wire format, transport, store, aggregation, server. Imports no training framework."""
