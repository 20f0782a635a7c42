"""Fixtures of the integrations' tests: a store with routed tables of the micro policy."""

import sys
from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.schemas.configs import (
    AnnotateConfig,
    ConvertConfig,
    ProblemsConfig,
    PromptConfig,
    RolloutConfig,
    VerifyConfig,
)
from trace_opd.schemas.settings import load_config
from trace_opd.tests.pipelines.conftest import paid_server  # noqa: F401 - a fixture

PROMPT = PromptConfig(student="{problem}", teacher="{problem}\nhint: {diagnostic_type}")
GROUPS, GROUP_SIZE = 4, 4
ROUTING = {"fkl": ("fkl", "none"), "rkl": ("none", "rkl")}


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Store:
    """Datasets fkl (key spans) and rkl (error spans) of the same rollouts."""
    store = Store(tmp_path_factory.mktemp("store"))
    prompt = f"prompt={{student: '{PROMPT.student}', teacher: \"{PROMPT.teacher}\"}}".replace(
        "\n", "\\n"
    )
    for name, kind, overrides in (
        (
            "problems",
            ProblemsConfig,
            ["source={kind: arithmetic, min_digits: 4, max_digits: 5}", f"limit={GROUPS}"],
        ),
        (
            "rollout",
            RolloutConfig,
            [prompt, f"group_size={GROUP_SIZE}", "sampling.max_new_tokens=96"],
        ),
        ("verify", VerifyConfig, ["workers=1"]),
        ("annotate", AnnotateConfig, ["annotator={engine: rule, error_types: true}"]),
    ):
        run_stage(name, load_config(kind, None, overrides, None), store)
    for name, (key, error) in ROUTING.items():
        routing = [f"routing.key={key}", f"routing.error={error}"]
        run_stage("convert", load_config(ConvertConfig, None, routing, None), store, name)
    return store


@pytest.fixture
def example_folder(tmp_path, monkeypatch) -> Path:
    """A working folder that imports nothing of another test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return tmp_path
