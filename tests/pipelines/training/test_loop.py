"""When a training writes a checkpoint."""

import pytest

from trace_opd.pipelines.training.loop import checkpoint_due
from trace_opd.schemas.configs import TrainConfig
from trace_opd.schemas.settings import override

CONFIG = override(TrainConfig(online={"steps": 7}), ["checkpoint_every=3"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limit", "minutes", "due"),
    [(30.0, 1.0, [3, 6, 7]), (30.0, 30.0, [1, 2, 3, 4, 5, 6, 7]), (None, 1e9, [3, 6, 7])],
)
def test_a_checkpoint_by_steps_or_by_minutes_and_after_the_last_step(limit, minutes, due):
    config = CONFIG.model_copy(update={"checkpoint_minutes": limit})
    assert [done for done in range(1, 8) if checkpoint_due(config, done, minutes)] == due


def test_when_checkpoints_are_written_does_not_enter_a_runs_id():
    assert override(CONFIG, ["checkpoint_minutes=1"]).semantic() == CONFIG.semantic()
