"""Commands that make web pages about runs."""
