"""What ships so that everything runs without a download: the micro policy, SmolLM2, the demo."""
