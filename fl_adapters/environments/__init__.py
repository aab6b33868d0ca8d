"""Where a job runs. `fl_adapters.Simulation` is here; each environment is imported when it is used."""
