"""`trace-opd compare`: how far annotators of the same rollouts agree."""
