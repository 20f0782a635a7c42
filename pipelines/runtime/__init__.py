"""What a run does with signals and event loops, for stages, engines and the command line."""
