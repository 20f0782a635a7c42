"""Looking at rollouts: the HTML report, the served viewer, and what both are drawn from."""
