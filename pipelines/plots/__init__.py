"""Pictures of runs and annotations for papers and READMEs: PNG and SVG, by matplotlib."""
