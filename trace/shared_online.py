"""Online steps under several ranks: all of them sample, the first does everything else; or servers
sample, and the first does all.
"""

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from .online import OnlineSource
from .ranks import Ranks
from .trainer import Online


class SharedOnline:
    """An online source whose sampling is spread over the ranks.

    source: the first rank's, None on the others; its own `sample` is replaced. sample: (problems,
    step) -> rollouts by this rank's copy of the current weights; None: the source samples as it is,
    and need not be an OnlineSource.
    """

    def __init__(
        self,
        source: OnlineSource | Online | None,
        sample: Callable[[pa.Table, int], pa.Table] | None,
        ranks: Ranks,
    ) -> None:
        self._source = source
        self._sample = sample
        self._ranks = ranks

    def collect(
        self, step: int, with_teacher: bool, phase: Callable[[str], None]
    ) -> tuple[pa.Table, dict[str, float]]:
        """The step's routed table and counts (`OnlineSource.collect`), the same on every rank."""
        if self._source is None:
            return self._follow()
        source = self._source
        if self._sample is not None:
            assert isinstance(source, OnlineSource), "only that one can sample in another way"
            source = source.spread(self._lead)
        made = source.collect(step, with_teacher, phase)
        self._ranks.broadcast((None, made))
        return made

    def _lead(self, problems: pa.Table, step: int) -> pa.Table:
        self._ranks.broadcast((problems, step))
        return self._share(problems, step)

    def _follow(self) -> Any:
        """Sample when the first rank does, as often as it does, until it has the step's table."""
        while True:
            problems, what = self._ranks.broadcast(None)
            if problems is None:
                return what
            self._share(problems, what)

    def _share(self, problems: pa.Table, step: int) -> pa.Table:
        """This rank's slice of the problems is sampled here, the others' elsewhere; all come back."""
        index, count = self._ranks.index, self._ranks.count
        begin, end = (len(problems) * edge // count for edge in (index, index + 1))
        share = problems.slice(begin, end - begin)
        assert self._sample is not None
        rollouts = self._sample(share, step) if len(share) else None
        return pa.concat_tables(part for part in self._ranks.gather(rollouts) if part is not None)
