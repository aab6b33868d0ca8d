"""Command `fl-adapters doctor`: finds what is wrong with an installation or a startup kit, and says how to fix it."""
