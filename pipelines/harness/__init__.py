"""Our problems, verifier and figures inside other people's evaluation harnesses."""
