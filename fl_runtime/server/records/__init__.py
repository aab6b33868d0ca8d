"""What a run leaves for people: events, history, TensorBoard scalars, results."""
