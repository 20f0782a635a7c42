"""What stage train needs around the trainer: sources, steps, validation, metrics, memory plan."""
