"""Rounds whose updates are masked: the server learns their sum alone."""
