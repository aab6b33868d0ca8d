"""The dashboard's view of a federation, over an admin's own connection to its server."""
