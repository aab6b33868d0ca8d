"""The trainings of a job: runs one after another, when the sites' scripts train more than once."""
