"""trace-opd: annotation and training toolkit for token-routed self on-policy distillation."""

__version__ = "0.1.0"
