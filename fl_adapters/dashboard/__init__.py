"""The dashboard: web pages on the loopback about runs in a folder, or about a federation as its admin sees it."""
