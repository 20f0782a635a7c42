"""The Qwen3 configs in configs/ pass the checks of a dry run, with a small model and local problems
in place of the hub's and a server on this machine in place of the API."""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.models import MICRO
from trace_opd.pipelines.planning.pipeline_plan import PipelinePlan, plan_pipeline
from trace_opd.schemas.configs import PipelineConfig
from trace_opd.schemas.settings import load_config

FOLDER = Path(__file__).parents[3] / "configs"
ON_POLICY = ["qwen3-1.7b", "qwen3-8b"]
OFFLINE_FIRST = [f"{name}-offline-first" for name in ON_POLICY]
AHEAD = ["rollout", "verify", "annotate", "convert"]
NO_VLLM = r"\w+: sampler.engine is vllm, which is not installed; .*"


def overrides(name: str, folder: Path, url: str) -> list[str]:
    """What stands for the hub and the API."""
    made = []
    for section, first in (("problems", 0), ("eval_problems", 100)):
        file = folder / f"{section}.jsonl"
        rows = [{"problem": f"What is {first + n} plus 1?", "answer": "1"} for n in range(8)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.append(f"{section}.source={{kind: files, path: {file}}}")
    stages = ["rollout", "convert"] * (name in OFFLINE_FIRST)
    made += [f"{stage}.policy.path={MICRO}" for stage in [*stages, "train", "evaluate"]]
    for annotator in ["annotate.annotator"] * bool(stages) + ["train.online.annotator"]:
        made += [f"{annotator}.base_url={url}", f"{annotator}.api_key_env=null"]
    return made


def planned(name: str, folder: Path, url: str) -> PipelinePlan:
    config = load_config(PipelineConfig, FOLDER / f"{name}.yaml", overrides(name, folder, url))
    return plan_pipeline(config, Store(folder / "store"), download=False)


@pytest.mark.parametrize("name", ON_POLICY + OFFLINE_FIRST)
def test_a_dry_run_of_a_shipped_config_finds_no_fault(name, tmp_path, paid_server):
    plan = planned(name, tmp_path, paid_server.url)
    faults = [fault for fault in plan.faults if not re.fullmatch(NO_VLLM, fault)]
    assert faults == []
    missing = find_spec("vllm") is None
    assert len(plan.faults) == missing * (2 if name in ON_POLICY else 3)
    assert all(stage.ref is not None for stage in plan.stages if stage.stage != "report")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ON_POLICY)
def test_a_pipeline_on_policy_from_step_0_makes_nothing_ahead_and_the_plan_gives_the_reason(
    name, tmp_path, paid_server, monkeypatch, capsys
):
    plan = planned(name, tmp_path, paid_server.url)
    stages = [stage.stage for stage in plan.stages]
    assert stages == ["problems", "train", "problems", "evaluate", "report"]
    assert plan.stages[1].reads == ["problems"]
    words = ["pipeline", str(FOLDER / f"{name}.yaml"), "--dry-run", "--store", str(tmp_path / "s")]
    words[2:2] = overrides(name, tmp_path, paid_server.url)
    monkeypatch.setattr(sys, "argv", ["trace-opd", *words])
    with pytest.raises(SystemExit):
        main()
    assert "train.offline.steps is 0: stages rollout, verify, annotate" in capsys.readouterr().out


@pytest.mark.parametrize("name", OFFLINE_FIRST)
def test_a_pipeline_with_offline_steps_makes_their_table(name, tmp_path, paid_server):
    plan = planned(name, tmp_path, paid_server.url)
    stages = [stage.stage for stage in plan.stages]
    assert stages == ["problems", *AHEAD, "train", "problems", "evaluate", "report"]
    assert not any("offline.steps" in note for note in plan.notes)
