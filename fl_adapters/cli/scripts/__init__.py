"""Commands about training scripts on this machine, and the templates of new ones."""
