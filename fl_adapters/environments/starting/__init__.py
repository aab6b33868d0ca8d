"""What a run on this machine is started with: its sites, where the data of each lie, and the arguments to resume it."""
