"""Fixtures of the exports' tests: the store of the integrations' tests, and scores of its rkl."""

import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.schemas.configs import ScoreConfig
from trace_opd.schemas.settings import load_config
from trace_opd.tests.integrations.conftest import store  # noqa: F401 - a fixture


@pytest.fixture(scope="session")
def scores(store: Store) -> Dataset:  # noqa: F811
    """The micro policy's scores of dataset rkl."""
    overrides = ["routed=rkl", "teacher={engine: local, policy: {path: micro}}"]
    made = run_stage("score", load_config(ScoreConfig, None, overrides, None), store, "scores")
    assert isinstance(made, Dataset)
    return made
