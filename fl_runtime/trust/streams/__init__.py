"""Streams between sites that the server passes on and cannot read: their keys, and who signs them."""
