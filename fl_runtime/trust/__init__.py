"""Who is who, and what only they may read. The only part that imports `cryptography`, which is optional."""
