"""What a training has around the trainer: its readers, online source, validation, tracking, plan."""
