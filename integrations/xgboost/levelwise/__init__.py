"""Mode "levelwise": trees grown from histograms that are summed over the sites, one sum for each level of a tree."""
