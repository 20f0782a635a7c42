"""Sums of two numbers, without end. The manual: OwnSource in data/sources/own.py."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


class Sums:
    endless = True  # the config sets `limit`

    @dataclass
    class Options:
        below: int = 1000

    def __init__(self, options: Options) -> None:
        self.below = options.below

    def rows(self, seed: int) -> Iterator[dict[str, Any]]:
        numbers = random.Random(seed)
        while True:
            a, b = numbers.randrange(100, self.below), numbers.randrange(100, self.below)
            yield {"problem": f"{a}+{b}", "answer": str(a + b)}
