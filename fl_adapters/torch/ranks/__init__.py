"""Several ranks of one site: who talks to the federation, and tensors of which each rank holds a part."""
