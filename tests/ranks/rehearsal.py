"""A rehearsal of a training on GPUs: torchrun of two and four ranks on a random Qwen3 of 30 M
parameters. `make test-ranks` runs it with the short form (test_*.py).
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.bundled.micro import build_tokenizer
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.run_metrics import read_metrics
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.schemas.settings import load_config

from .models import save_qwen3
from .torchrun import CLI, CONFIG, HERE, OURS, SHORT, annotator, children, ended, sentences, started

ROOT = HERE.parents[1]
STEPS = 10
# Weights after ten steps, float32: at most this far from one rank's. Each step moves a weight by up
# to the learning rate, 1e-5.
TOLERANCE = 1e-6
REWARD = f"verify.reward.engine={HERE}/own.py:parity"
OFFLINE = [f"offline.steps={STEPS}", "online.steps=0", "optim.lr=1e-5", "groups_per_step=4",
           "micro_batch_tokens=300", "teacher.sync_steps=3", "tracker=none"]  # fmt: skip
ONLINE = ["offline.steps=0", "online.steps=3", "online.group_size=4", "groups_per_step=4",
          "online.sampling.max_new_tokens=24", f"online.{REWARD}", "optim.lr=1e-5",
          "online.routing.alpha=1",
          f"online.annotator={{engine: self, prompt: {ROOT}/studies/micro-annotate.md, "
          f"answer_schema: {ROOT}/studies/micro-answer.schema.json, max_new_tokens: 64}}",
          "validation={problems: {test: held-out}, every: 2, k: 2}", "tracker=none"]  # fmt: skip
TRAINED = {"full": [], "lora": ["lora.rank=4"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Qwen3 of random weights with the micro policy's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    model = save_qwen3(
        folder,
        vocab_size=len(build_tokenizer()),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    assert 28e6 < model.num_parameters() < 34e6
    return folder


@pytest.fixture(scope="module")
def source(base, tmp_path_factory) -> Path:
    """A store of problems, and of what the random policy made of them up to table routed."""
    store = Store(tmp_path_factory.mktemp("source"))
    policy = f"policy.path={base}"

    def stage(name: str, *overrides: str, alias: str | None = None) -> Dataset:
        config = load_config(REGISTRY[name].config_type, CONFIG, list(overrides), name)
        made = run_stage(name, config, store, alias)
        assert isinstance(made, Dataset)
        return made

    stage("problems", "limit=5", "seed=1", alias="held-out")
    stage("problems", "limit=8")
    stage("rollout", policy, "group_size=4", "sampling.max_new_tokens=24")
    stage("verify", REWARD.removeprefix("verify."))
    stage("annotate", annotator("Slow").removeprefix("online."))
    routed = stage("convert", policy, "routing.alpha=1")
    assert any(routed.read()["coverage"].to_pylist())
    return store.files.local_root()


@pytest.fixture
def root(source, tmp_path) -> Path:
    return shutil.copytree(source, tmp_path / "store")


def command(base: Path, root: Path, *overrides: str) -> list[object]:
    return ["train", CONFIG, f"policy.path={base}", *overrides, "--store", root]


def trained(ranks: int, base: Path, root: Path, *overrides: str) -> Path:
    """The folder of a run that went to its end."""
    entry = [] if ranks > 1 else ["-m", CLI]
    code, _, error = ended(
        ranks, *entry, *command(base, root, *overrides), launcher=OURS, timeout=900
    )
    assert code == 0, error
    (run,) = root.glob("train/*")
    return run


def lines(root: Path) -> list[dict]:
    return [line for path in root.glob("train/*/metrics.jsonl") for line in read_metrics(path)]


def difference(left: Path, right: Path) -> float:
    """The largest between two runs' weights."""
    ours, theirs = (load_file(run / "checkpoints/final/model.safetensors") for run in (left, right))
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def alone(base, source, tmp_path_factory) -> Callable[[str], Path]:
    """The offline run of one rank by what is trained."""

    @cache
    def run(name: str) -> Path:
        root = shutil.copytree(source, tmp_path_factory.mktemp("alone") / "store")
        return trained(1, base, root, *OFFLINE, *TRAINED[name])

    return run


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", TRAINED)
def test_ten_steps_on_many_ranks_give_the_weights_of_one(base, root, alone, name, ranks):
    run = trained(ranks, base, root, *OFFLINE, *TRAINED[name])
    ours, theirs = (read_metrics(made / "metrics.jsonl") for made in (run, alone(name)))
    assert len(ours) == STEPS
    for left, right in zip(ours, theirs, strict=True):
        for metric in ("loss", "grad_norm", "entropy"):
            assert left[metric] == pytest.approx(right[metric], rel=1e-3, abs=1e-6)
    assert 0 < difference(run, alone(name)) < TOLERANCE


@pytest.fixture(scope="module")
def alone_online(base, source, tmp_path_factory) -> Path:
    root = shutil.copytree(source, tmp_path_factory.mktemp("alone") / "store")
    return trained(1, base, root, *ONLINE)


@pytest.mark.parametrize(("ranks", "name"), [(2, "full"), (4, "full"), (2, "lora")])
def test_online_steps_annotate_themselves_and_validate_on_every_rank(
    base, root, alone_online, ranks, name
):
    run = trained(ranks, base, root, *ONLINE, *TRAINED[name])
    made = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in made] == [0, 1, 2]
    assert made[0]["coverage_fkl"] > 0
    assert all("validation_test_greedy" in line for line in made[1:])
    # Before the first step the weights are those of one rank, and so are all answers.
    first = "validation/step-000000.parquet"
    counts = ["problem_id", "decoding", "k", "correct", "tokens"]
    ours, theirs = (pq.read_table(made / first, columns=counts) for made in (run, alone_online))
    assert ours == theirs
    ours, theirs = (first_rollouts(path) for path in (run, alone_online))
    assert ours["token_ids"] == theirs["token_ids"]


def first_rollouts(run: Path) -> pa.Table:
    """The rollouts of a run's first online step."""
    tables = json.loads((run / "manifest.json").read_text())["summary"]["tables"]
    return Store(run.parents[1]).get(tables["rollouts"]).read_part(0)


def wait_for(root: Path, steps: int, process) -> None:
    deadline = time.monotonic() + 300
    while len(lines(root)) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("name", TRAINED)
def test_sigterm_leaves_a_checkpoint_from_which_four_ranks_go_on(base, root, alone, name):
    overrides = [*OFFLINE, *TRAINED[name]]
    with started(2, *command(base, root, *overrides), launcher=OURS) as process:
        wait_for(root, 3, process)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    done = len(lines(root))
    assert len(sentences(error)) == 1, error
    (line,) = sentences(error)
    assert f"stopped after {done} of {STEPS} steps; a checkpoint is written" in line
    assert "Traceback" not in error
    assert process.returncode == 128 + signal.SIGTERM
    assert [path.name for path in root.glob("train/*/checkpoints/*")] == [f"step-{done:05d}"]
    run = trained(4, base, root, *overrides)
    assert len(lines(root)) == STEPS
    assert difference(run, alone(name)) < TOLERANCE


def test_a_killed_rank_ends_all_and_one_rank_goes_on_from_the_newest_checkpoint(base, root, alone):
    every = "checkpoint_every=2"
    with started(4, *command(base, root, *OFFLINE, every), launcher=OURS) as process:
        wait_for(root, 3, process)
        os.kill(children(process)[2], signal.SIGKILL)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert sentences(error)[-1] == "trace-opd: rank 2 was ended by SIGKILL"
    assert "Traceback" not in error
    run = trained(1, base, root, *OFFLINE, every)
    assert difference(run, alone("full")) < TOLERANCE


def test_ranks_that_wait_in_a_collective_on_the_devices_give_up(root):
    """What test_waiting.py shows to pass fails if objects go through the devices' group."""
    program = [HERE / "device_timeout.py", "devices", 4, root, CONFIG]
    code, _, error = ended(2, *program, *SHORT, annotator("Slow", seconds=6))
    assert code != 0
    assert "Timed out waiting" in error


def test_ranks_wait_while_the_first_verifies_longer_than_for_a_device(root):
    """Twelve responses at each validation, a second each."""
    program = [HERE / "device_timeout.py", "gloo", 4, root, CONFIG]
    reward = f"online.verify={{reward: {{engine: '{HERE}/own.py:slow'}}, workers: 1}}"
    asked = "validation={problems: {test: held-out}, k: 1}"
    code, _, error = ended(2, *program, *SHORT, annotator("Slow"), reward, asked)
    assert code == 0, error


def test_an_annotator_that_raises_ends_every_rank_with_its_sentence(root):
    train = ["train", CONFIG, *SHORT, annotator("Wrong"), "--store", root]
    code, _, error = ended(2, *train, launcher=OURS, timeout=120)
    assert len(sentences(error)) == 1, error
    (line,) = sentences(error)
    assert "ValueError: no such span" in line
    assert code == 1


def test_bad_input_is_one_sentence_and_the_exit_code_of_one_rank(root):
    train = ["train", CONFIG, *SHORT, "online.problems=nowhere", "--store", root]
    code, _, error = ended(2, *train, launcher=OURS)
    assert len(sentences(error)) == 1, error
    (line,) = sentences(error)
    assert "'nowhere' is not in store" in line
    assert "Traceback" not in error
    assert code == 2


def test_an_unknown_key_is_one_sentence_of_all_ranks(root):
    code, _, error = ended(4, "train", CONFIG, "onlin.steps=1", "--store", root, launcher=OURS)
    assert len(sentences(error)) == 1, error
    (line,) = sentences(error)
    assert "onlin" in line
    assert code == 2


def test_without_torchrun_ranks_end_with_the_first_one(root):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    train = ["-m", CLI, "train", CONFIG, *SHORT, annotator("Wrong"), "--store", root]
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(started(1, *train, **ranks, RANK=str(rank))) for rank in (0, 1)
        ]
        (_, first), (_, other) = (process.communicate(timeout=120) for process in processes)
    assert "ValueError: no such span" in sentences(first)[0]
    assert "Traceback" not in first + other
    assert [process.returncode for process in processes] == [1, 1]


def test_slurms_script_queues_a_job_again_whose_signal_left_a_checkpoint(root, tmp_path):
    """With scripts in place of srun and scontrol."""
    scripts = {
        "srun": f'shift\n"$@" &\necho $! > {tmp_path}/pid\nwait $!\n',
        "scontrol": f'[ "$1" = show ] && echo localhost || echo "$*" > {tmp_path}/queued\n',
    }
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}")
        (programs / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_GPUS_ON_NODE": "2",
        "RENDEZVOUS_PORT": port,
        "TRACE_OPD_STORE": str(root),
        "OMP_NUM_THREADS": "1",
    }
    job = subprocess.Popen(
        ["bash", ROOT / "deploy/slurm/train.sbatch", CONFIG, *SHORT, "online.steps=500"],
        env=os.environ | variables,
        start_new_session=True,
    )
    try:
        wait_for(root, 1, job)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
        assert job.wait(120) == 128 + signal.SIGTERM
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert (tmp_path / "queued").read_text() == "requeue 7\n"
    assert len(list(root.glob("train/*/checkpoints/step-*"))) == 1
