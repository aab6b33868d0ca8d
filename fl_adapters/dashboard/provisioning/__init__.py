"""The dashboard's view of a project: its participants, their kits and certificates, on the authority's machine."""
