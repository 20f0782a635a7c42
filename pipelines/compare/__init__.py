"""Annotations of the same rollouts held against one another: trace-opd compare."""
