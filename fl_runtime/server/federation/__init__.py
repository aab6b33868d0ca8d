"""The server of a provisioned federation: who may call, and the queue of jobs."""
