"""The calls of sites: decoded, bounded, spooled to disk or relayed to other sites, and answered by the run."""
