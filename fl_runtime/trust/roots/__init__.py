"""Trusted roots: chains of certificates, and the change from one root to the next."""
