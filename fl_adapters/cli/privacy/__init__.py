"""Commands `fl-adapters privacy ...`: the noise for a budget, what has been spent, and what has left a site."""
