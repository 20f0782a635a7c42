"""The stages: each file resolves its inputs, makes parts and sums them up (base.py)."""
