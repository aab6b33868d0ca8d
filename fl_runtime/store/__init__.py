"""The server's storage: a journal in SQLite, and blobs (tensor files mapped into memory)."""
