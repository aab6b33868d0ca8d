"""The dashboard's pages about runs in a folder: simulations, and results downloaded from a server."""
