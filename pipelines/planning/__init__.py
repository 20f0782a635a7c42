"""What runs would do, read and cost, checked before any work."""
