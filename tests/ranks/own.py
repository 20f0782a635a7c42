"""Annotators and a reward of one's own for the tests' configs."""

import time

from trace_opd.pipelines.annotators.rows import Reading


class Slow:
    """Works for options.seconds at each step, and as long when it closes."""

    def __init__(self, options):
        self.seconds = options["seconds"]

    def annotate(self, items):
        print("annotating", flush=True)
        time.sleep(self.seconds)
        return [Reading("ok", [[0]], "case_analysis") for _ in items]

    def close(self):
        time.sleep(self.seconds)


class Wrong(Slow):
    def annotate(self, items):
        raise ValueError("no such span")


def parity(response: str) -> bool:
    """A policy of random weights gets it for half of its responses."""
    return len(response) % 2 == 0


def slow(response: str) -> bool:
    time.sleep(3)
    return parity(response)
