"""Records of a run for people: events, history, TensorBoard scalars and results."""
