"""What the server keeps: a journal (SQLite) and blobs (files of tensors, mapped into memory)."""
