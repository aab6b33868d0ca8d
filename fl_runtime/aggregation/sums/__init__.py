"""Sums of vectors and unions of texts over all sites, in place of a model: what a script calls, and the strategy."""
