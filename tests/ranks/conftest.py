"""A store of problems for short trainings of the micro policy."""

from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.schemas.configs import ProblemsConfig
from trace_opd.schemas.settings import load_config

from .torchrun import CONFIG


@pytest.fixture
def root(tmp_path) -> Path:
    run_stage(
        "problems", load_config(ProblemsConfig, CONFIG, ["limit=4"], "problems"), Store(tmp_path)
    )
    return tmp_path
