"""Several ranks give one rank's result: two gloo processes on CPU, FSDP2, the micro policy."""

import json
import shutil
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from trace_opd.pipelines.annotators.rule import StepsAnnotator
from trace_opd.pipelines.bundled.demonstrations import STUDENT_TEMPLATE, TEACHER_TEMPLATE
from trace_opd.pipelines.bundled.micro import arithmetic_problems, exact_verdicts
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.rollouts import rollouts_table
from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler
from trace_opd.schemas.configs import (
    PromptConfig,
    RoutingConfig,
    RuleAnnotator,
    SamplingConfig,
    SegmentConfig,
)
from trace_opd.schemas.labels import Route
from trace_opd.tests.kill.ends import MEASURED
from trace_opd.tests.kill.harness import Launcher
from trace_opd.tests.ranks.torchrun import forked
from trace_opd.trace.align import byte_table
from trace_opd.trace.batches import rank_batches, shares
from trace_opd.trace.identity import TRAINER_FILE
from trace_opd.trace.policy import load_policy
from trace_opd.trace.routed import routed_table
from trace_opd.trace.sequences import training_sequences

PROMPT = PromptConfig(
    student=STUDENT_TEMPLATE, teacher=TEACHER_TEMPLATE, privileged="{problem}\n{context}"
)
CONTRAST = "contrast"
LONG = PromptConfig(student=STUDENT_TEMPLATE, teacher="\n".join(8 * [TEACHER_TEMPLATE]))
# Trains each given run to its last step, from the newest checkpoint if there is one, and leaves a
# checkpoint.
PROGRAM = """
import json, sys
from pathlib import Path
import pyarrow.parquet as pq
import torch
from trace_opd.schemas.configs import TrainConfig
from trace_opd.pipelines.models import teacher_files
from trace_opd.trace.checkpoint import resume, save_checkpoint, save_model
from trace_opd.trace.other_teacher import load_teacher
from trace_opd.trace.policy import load_policy
from trace_opd.trace.ranks import join_ranks
from trace_opd.trace.trainer import Trainer

policy, runs = sys.argv[1:]
torch.set_num_threads(1)
ranks = join_ranks("cpu")
for table, folder, config, until in json.loads(runs):
    routed = pq.read_table(table)
    folder, config = Path(folder), TrainConfig.model_validate(config)
    precision = config.policy.precision
    loaded = load_policy(policy, "cpu", precision, trainable=True, lora=config.lora)
    taught_by, other = None, config.teacher.model
    if other is not None:
        taught_by = load_teacher(teacher_files(other), loaded, ranks)
    trainer = Trainer(loaded, config, ranks, taught_by)
    resume(trainer, folder)
    for metrics in trainer.run(lambda step: routed, None):
        if ranks.first:
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics) + "\\n")
        if trainer.state.step == until:
            break
    save_checkpoint(trainer, folder)
    save_model(trainer, folder / "final")
"""
# Two online steps: all ranks sample, then the first alone and one step ahead. Leaves each rank's
# tables, how many problems it sampled in each way, and how often it followed the weights.
ONLINE = """
import json, sys
from pathlib import Path
import pyarrow.parquet as pq
import torch
from trace_opd.pipelines.annotators.rule import StepsAnnotator
from trace_opd.pipelines.bundled.micro import arithmetic_problems, exact_verdicts
from trace_opd.pipelines.samplers.rollouts import rollouts_table
from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler
from trace_opd.schemas.configs import *
from trace_opd.trace.align import byte_table
from trace_opd.trace.online import OnlineSource
from trace_opd.trace.policy import load_policy
from trace_opd.trace.ranks import join_ranks

class Verifier:
    verify = staticmethod(exact_verdicts)

folder, path, prompt = Path(sys.argv[1]), sys.argv[2], PromptConfig.model_validate_json(sys.argv[3])
torch.set_num_threads(1)
ranks = join_ranks("cpu")
policy = load_policy(path, "cpu")
sampler = TransformersPolicySampler(policy, 32_768)
sampled, followed = [0, 0], []

def sample(problems, step):
    sampled[not share] += len(problems)
    how = SamplingConfig(max_new_tokens=96)
    return rollouts_table(problems, sampler, policy.tokenizer, prompt, how, 4, step)

for share in (True, False):
    annotator = StepsAnnotator(RuleAnnotator(engine="rule"), SegmentConfig())
    source = OnlineSource(
        problems=lambda step, refill: arithmetic_problems(5, 10 * step + refill),
        sample=sample,
        verifier=Verifier(),
        annotator=annotator if ranks.first else None,
        bytes=byte_table(policy.tokenizer),
        routing=RoutingConfig(key="fkl", error="rkl"),
        write=lambda step, tables: None,
        refill_rounds=1,
        follow=lambda phase: followed.append(share),
        ranks=ranks,
        share=share,
        ahead={} if share else {0: True, 1: False},
    )
    for step in range(2):
        table, _ = source.collect(step, step == 0, lambda _: None)
        pq.write_table(table, folder / f"{share}-{step}-{ranks.index}.parquet")
    source.close()
(folder / f"{ranks.index}.json").write_text(json.dumps([sampled, len(followed)]))
"""
SETTINGS = {
    "prompt": PROMPT.model_dump(),
    "offline": {"steps": 3},
    "optim": {"lr": 1e-4},
    "schedule": {"hold_steps": 1, "decay_steps": 2},
    "micro_batch_tokens": 400,
}
CASES = {
    "plain": {},
    "trace": {"teacher": {"sync_steps": 2}},
    "reference": {"loss": {"reference_kl": 0.1, "aggregation": "token"}},
    "ema": {"teacher": {"sync": "ema"}},
    "lora": {"lora": {"rank": 4}},
    "frozen": {"teacher": {"sync": "frozen"}},
    # Read by the first rank, and micro again, so it is the frozen teacher.
    "another model": {"teacher": {"sync": "frozen", "model": {"path": "micro"}}},
    # The teacher has several passes within one of the student's.
    "long contexts": {"prompt": LONG.model_dump(), "micro_batch_tokens": 250},
    # With routes and contexts of its own: see `routed`. It has more passes than the teacher alone.
    CONTRAST: {
        "micro_batch_tokens": 250,
        "schedule": {"start_step": 1, "hold_steps": 3},
        "teacher": {"temperature": 1.3},
        "loss": {
            "reweight": "bounded",
            "gates": [
                {"of": "teacher_entropy", "shape": "below", "quantile": 0.7, "floor": 0.2},
                {"of": "student_entropy", "shape": "rising", "quantile": 0.5},
            ],
        },
    },
}
PLAIN, LORA = CASES["plain"], CASES["lora"]
BFLOAT16 = {"policy": {"precision": "bfloat16"}}
EIGHT_BITS = {"optim": SETTINGS["optim"] | {"kind": "adamw_8bit"}}


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Path:
    """Five groups of four, so ranks get different numbers of groups."""
    policy = load_policy(resolve_policy("micro"), "cpu")
    problems = arithmetic_problems(5, 0)
    sampler = TransformersPolicySampler(policy, 32_768)
    sampling = SamplingConfig(max_new_tokens=96)
    rollouts = rollouts_table(problems, sampler, policy.tokenizer, PROMPT, sampling, 4, 0)
    verdicts = exact_verdicts(problems, rollouts)
    annotator = StepsAnnotator(RuleAnnotator(engine="rule"), SegmentConfig())
    annotations = annotator.annotate(problems, rollouts, verdicts)
    routing = RoutingConfig(key=Route.FKL, error=Route.RKL)
    path = tmp_path_factory.mktemp("routed") / "routed.parquet"
    tables = (problems, rollouts, verdicts, annotations, byte_table(policy.tokenizer))
    pq.write_table(routed_table(*tables, routing), path)
    routing = RoutingConfig(
        rule="all", key="reweight", error="reweight",
        teacher_context="solution", contrast_context="wrong_peer", contrasts=2,
    )  # fmt: skip
    pq.write_table(routed_table(*tables, routing), path.with_stem(CONTRAST))
    return path


def train(forks: Launcher, ranks: int, routed: Path, *runs: tuple[Path, dict, int]) -> None:
    """Runs on `ranks` ranks, one after another in the same processes: folder, config, last step."""
    for folder, _, _ in runs:
        folder.mkdir(exist_ok=True)
    tables = {CONTRAST: routed.with_stem(CONTRAST)}
    plan = json.dumps(
        [
            (str(tables.get(folder.name, routed)), str(folder), SETTINGS | config, until)
            for folder, config, until in runs
        ]
    )
    launch(forks, ranks, PROGRAM, resolve_policy("micro"), plan)


def launch(forks: Launcher, ranks: int, text: str, *arguments: str | Path) -> None:
    with NamedTemporaryFile("w", suffix=".py") as file:
        file.write(text)
        file.flush()
        forked(forks, ranks, *arguments, program=Path(file.name))


@pytest.fixture(scope="module")
def one(forks, routed, tmp_path_factory) -> Path:
    """Every case to its end on one rank, one folder each; `first…` only to their first step.

    In bfloat16 one rank is a group with shards.
    """
    root = tmp_path_factory.mktemp("one")
    train(
        forks,
        1,
        routed,
        *((root / name, config, 3) for name, config in CASES.items()),
        (root / "first", PLAIN, 1),
        (root / "bfloat16", BFLOAT16, 3),
        (root / "first bfloat16", BFLOAT16, 1),
        (root / "8 bits", EIGHT_BITS, 3),
        (root / "first 8 bits", EIGHT_BITS, 1),
    )
    return root


@pytest.fixture(scope="module")
def two(forks, routed, tmp_path_factory) -> Path:
    """The same on two ranks."""
    root = tmp_path_factory.mktemp("two")
    train(
        forks,
        2,
        routed,
        *((root / name, config, 3) for name, config in CASES.items()),
        (root / "first", PLAIN, 1),
        (root / "first lora", LORA, 1),
    )
    return root


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(left: Path, right: Path) -> float:
    ours, theirs = (load_file(f / "final" / "model.safetensors") for f in (left, right))
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def test_two_ranks_split_a_group_here_and_have_unequal_rows_of_the_teacher(routed):
    """The comparison below depends on it."""
    tokenizer = load_policy(resolve_policy("micro"), "cpu").tokenizer
    sequences = training_sequences(pq.read_table(routed), tokenizer, LONG)
    groups = [{s.group_id for s in share} for share in shares(sequences, 2, with_teacher=True)]
    assert groups[0] & groups[1]
    first, second = (rank_batches(sequences, rank, 2, 250, with_teacher=True) for rank in range(2))
    pairs = list(zip(first, second, strict=True))
    assert any(min(len(one.taught), len(other.taught)) > 1 for one, other in pairs)
    assert any(len(one.taught) != len(other.taught) for one, other in pairs)
    contrasted = training_sequences(pq.read_table(routed.with_stem(CONTRAST)), tokenizer, PROMPT)
    first, second = (rank_batches(contrasted, rank, 2, 250, with_teacher=True) for rank in range(2))
    pairs = list(zip(first, second, strict=True))
    assert any(len(one.contrasts) != len(other.contrasts) for one, other in pairs)
    assert any(one.contrast_passes > one.teacher_passes for one in first)
    assert {len(s.contrast_prompt_ids) for s in contrasted} >= {0, 1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name != "plain"])
def test_two_ranks_give_the_metrics_and_weights_of_one(case, one, two):
    for alone, together in zip(metrics(one / case), metrics(two / case), strict=True):
        for name, value in alone.items():
            if isinstance(value, float) and not MEASURED.search(name):
                assert together[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert largest_difference(one / case, two / case) < 2e-6


@pytest.mark.slow
def test_a_teacher_read_from_files_is_the_frozen_copy_of_the_same_model(one, two):
    for root in (one, two):
        assert largest_difference(root / "frozen", root / "another model") == 0


@pytest.mark.slow
def test_two_ranks_take_the_limits_of_gates_from_all_tokens(one, two):
    alone, together = (
        json.loads((root / CONTRAST / "step-00003" / TRAINER_FILE).read_text())["state"]["limits"]
        for root in (one, two)
    )
    assert together["thresholds"] == pytest.approx(alone["thresholds"], rel=1e-4)


def resumed_copies(
    forks: Launcher, routed: Path, folder: Path, ranks: int, *firsts: tuple[Path, dict]
) -> list[Path]:
    """Copies of runs of one step, each at its last step now."""
    copies = [folder / f"{ranks} {index}" for index in range(len(firsts))]
    for (first, _), copy in zip(firsts, copies, strict=True):
        shutil.copytree(first, copy)
        shutil.rmtree(copy / "final")
    configs = [config for _, config in firsts]
    train(forks, ranks, routed, *zip(copies, configs, [3] * len(copies), strict=True))
    for copy in copies:
        assert [line["step"] for line in metrics(copy)] == [0, 1, 2]
    return copies


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_ranks_sharded_or_not(
    forks, routed, one, two, tmp_path
):
    resumed = partial(resumed_copies, forks, routed, tmp_path)
    sharded = one / "first bfloat16"  # on one rank
    same, eight, low, plain, lora, from_two = resumed(
        1,
        (one / "first", PLAIN),
        (one / "first 8 bits", EIGHT_BITS),
        (sharded, BFLOAT16),
        (sharded, PLAIN),
        (two / "first lora", LORA),
        (two / "first", PLAIN),
    )
    same_two, from_one, eight_on_two = resumed(
        2,
        (two / "first", PLAIN),
        (one / "first", PLAIN),
        (one / "first 8 bits", EIGHT_BITS),
    )
    # Bit for bit under the same number of ranks, else to rounding.
    assert largest_difference(same, one / "plain") == 0
    assert largest_difference(low, one / "bfloat16") == 0
    assert largest_difference(eight, one / "8 bits") == 0
    assert largest_difference(same_two, two / "plain") == 0
    for folder in (from_two, from_one):
        assert largest_difference(folder, one / "plain") < 2e-6
    assert largest_difference(lora, one / "lora") < 2e-6
    assert largest_difference(eight_on_two, one / "8 bits") < 1e-4  # rounding may take another code
    assert largest_difference(plain, one / "plain") < 1e-3  # its first step was in bfloat16


@pytest.mark.ranks
def test_a_run_of_two_ranks_resumes_on_four(forks, routed, one, two, tmp_path):
    (on_four,) = resumed_copies(forks, routed, tmp_path, 4, (two / "first", PLAIN))
    assert largest_difference(on_four, one / "plain") < 2e-6


@pytest.mark.slow
def test_each_rank_writes_its_share_of_a_checkpoint(one, two):
    sizes = {
        name: [
            file.stat().st_size
            for file in sorted((root / "trace" / "step-00003" / "shards").iterdir())
        ]
        for name, root in (("one", one), ("two", two))
    }
    (whole,), halves = sizes["one"], sizes["two"]
    assert len(halves) == 2
    for half in halves:
        assert half == pytest.approx(whole / 2, rel=0.05)


@pytest.mark.slow
def test_two_ranks_make_the_online_steps_of_one(forks, tmp_path):
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        launch(
            forks, ranks, ONLINE,
            tmp_path / str(ranks), resolve_policy("micro"), PROMPT.model_dump_json(),
        )  # fmt: skip
    for share in (True, False):
        for step in range(2):
            alone, *together = (
                pq.read_table(tmp_path / folder / f"{share}-{step}-{rank}.parquet")
                for folder, rank in (("1", 0), ("2", 0), ("2", 1))
            )
            assert together[0] == together[1]
            # A batch of other prompts changes the last bits of the logits.
            compared = ["rollout_id"] if share else alone.column_names
            assert together[0].select(compared) == alone.select(compared)
    (one, _), (first, follows), (second, others) = (
        json.loads((tmp_path / name).read_text()) for name in ("1/0.json", "2/0.json", "2/1.json")
    )
    assert follows == others == 4
    assert [first[0] + second[0], first[1]] == one
    assert second[0] > 4
    assert second[1] == 0
