"""Principal components and singular vectors over all sites."""
