"""Hundreds of sites in a few worker processes: each site's round is a function."""
