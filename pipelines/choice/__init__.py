"""Which responses are annotated, and which problems are trained on: selection, contamination."""
