"""Entry point of `python -m trace_opd.pipelines.cli` and of torchrun."""

from . import main

main()
