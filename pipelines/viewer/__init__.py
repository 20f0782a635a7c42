"""The HTML report, the served viewer, and the rollouts that both draw."""
