"""Parts of the journal of a run, each with a reader and a writer of its own."""
