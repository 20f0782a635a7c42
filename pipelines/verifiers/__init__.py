"""Judge answers: read the answer out of a response, compare it with the gold answer."""
