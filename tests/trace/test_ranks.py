"""Several ranks end as one does: two gloo processes on CPU, FSDP2, the bundled micro policy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from trace_opd.pipelines.annotators.rule import StepsAnnotator
from trace_opd.pipelines.demonstrations import STUDENT_TEMPLATE, TEACHER_TEMPLATE
from trace_opd.pipelines.micro import arithmetic_problems, exact_verdicts
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.rollout import rollouts_table
from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler
from trace_opd.schemas.configs import (
    PromptConfig,
    RoutingConfig,
    RuleAnnotator,
    SamplingConfig,
    SegmentConfig,
)
from trace_opd.schemas.labels import Action
from trace_opd.trace.align import byte_table
from trace_opd.trace.convert import routed_table
from trace_opd.trace.policy import load_policy

PROMPT = PromptConfig(student=STUDENT_TEMPLATE, teacher=TEACHER_TEMPLATE)
# Trains to a step, leaves a checkpoint there, and goes on from the newest one if there is one.
PROGRAM = """
import json, sys
from pathlib import Path
import pyarrow.parquet as pq
import torch
from trace_opd.schemas.configs import TrainConfig
from trace_opd.trace.checkpoint import latest_checkpoint, restore, save_checkpoint, save_model
from trace_opd.trace.policy import load_policy
from trace_opd.trace.ranks import join_ranks
from trace_opd.trace.trainer import Trainer

table, config, policy, folder, until = sys.argv[1:]
torch.set_num_threads(1)
ranks = join_ranks("cpu")
config = TrainConfig.model_validate_json(config)
trainer = Trainer(load_policy(policy, "cpu", trainable=True, lora=config.lora), config, ranks)
if (checkpoint := latest_checkpoint(Path(folder))) is not None:
    restore(trainer, checkpoint)
routed = pq.read_table(table)
steps = trainer.run(lambda step: routed, None)
for metrics in steps:
    if ranks.first:
        with open(folder + "/metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\\n")
    if trainer.state.step == int(until):
        break
save_checkpoint(trainer, Path(folder))
save_model(trainer, Path(folder) / "final")
"""


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Path:
    """Five groups of four: ranks get different numbers of them."""
    policy = load_policy(resolve_policy("micro"), "cpu")
    problems = arithmetic_problems(5, 0)
    sampler = TransformersPolicySampler(policy, 32_768)
    sampling = SamplingConfig(max_new_tokens=96)
    rollouts = rollouts_table(problems, sampler, policy.tokenizer, PROMPT, sampling, 4, 0)
    verdicts = exact_verdicts(problems, rollouts)
    annotator = StepsAnnotator(RuleAnnotator(engine="rule"), SegmentConfig())
    annotations = annotator.annotate(problems, rollouts, verdicts)
    routing = RoutingConfig(key=Action.FKL, error=Action.RKL)
    path = tmp_path_factory.mktemp("routed") / "routed.parquet"
    bytes_of = byte_table(policy.tokenizer)
    pq.write_table(routed_table(problems, rollouts, verdicts, annotations, bytes_of, routing), path)
    return path


def train(ranks: int, routed: Path, folder: Path, until: int = 3, **config) -> list[dict]:
    """Metrics so far of a run in `folder`, taken up to the step `until` by so many ranks."""
    folder.mkdir(exist_ok=True)
    settings = {
        "prompt": PROMPT.model_dump(),
        "offline": {"steps": 3},
        "optim": {"lr": 1e-4},
        "schedule": {"hold_steps": 1, "decay_steps": 2},
        "micro_batch_tokens": 400,
    } | config
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    program = folder / "program.py"
    program.write_text(PROGRAM)
    subprocess.run(
        [*launcher, program, routed, json.dumps(settings), resolve_policy("micro"), folder, str(until)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=180,
    )  # fmt: skip
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(left: Path, right: Path) -> float:
    ours, theirs = (load_file(f / "final" / "model.safetensors") for f in (left, right))
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


CASES = {
    "trace": {"teacher": {"sync_steps": 2}},
    "reference": {"loss": {"reference_kl": 0.1, "aggregation": "token"}},
    "ema": {"teacher": {"sync": "ema"}},
    "lora": {"lora": {"rank": 4}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_metrics_and_weights_of_one(case, routed, tmp_path):
    one = train(1, routed, tmp_path / "one", **CASES[case])
    two = train(2, routed, tmp_path / "two", **CASES[case])
    for alone, together in zip(one, two, strict=True):
        for name, value in alone.items():
            if isinstance(value, float) and "second" not in name:
                assert together[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 2e-6


@pytest.mark.slow
def test_a_run_goes_on_under_another_number_of_ranks(routed, tmp_path):
    train(1, routed, tmp_path / "one")
    train(2, routed, tmp_path / "changed", until=1)
    metrics = train(1, routed, tmp_path / "changed")
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert largest_difference(tmp_path / "one", tmp_path / "changed") < 2e-6
