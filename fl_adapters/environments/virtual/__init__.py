"""Virtual sites: simulates hundreds of sites in a few worker processes that call a function for each site and round."""
