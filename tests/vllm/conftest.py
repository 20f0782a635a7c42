"""Fixtures for real vLLM: engines in this environment, server processes, training by command line.

    make test-vllm

The model is SmolLM2-135M; VLLM_TEST_MODEL=micro takes the bundled micro policy.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.schemas.settings import load_config
from trace_opd.trace.policy import Policy, load_policy

MODEL = os.environ.get("VLLM_TEST_MODEL", "smollm2")
ROOT = Path(__file__).parents[2]  # bundled models are made below it
CONFIG = ROOT / "configs" / f"{MODEL}.yaml"
STEPS, GROUPS, GROUP_SIZE = 5, 2, 4
# Weights must move with any rewards, so every token follows the teacher, which reads the answer.
TRAIN = [
    "offline.steps=0", f"online.steps={STEPS}", f"groups_per_step={GROUPS}",
    f"online.group_size={GROUP_SIZE}", "checkpoint_every=1",
    "online.sampling={temperature: 1.0, max_new_tokens: 32}",
    "online.routing={rule: all, key: fkl, error: fkl, teacher_context: answer}",
    "schedule={w0: 0.5, decay_steps: null}", "optim.lr=1.0e-5", "policy.precision=float32",
]  # fmt: skip
# Nats, float32. Measured: 6e-5 at most on SmolLM2-135M.
TOLERANCE = 5e-4
_START_S = 500
# Without compilation vLLM starts in a third of the time and computes the same.
QUICK = {
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="session", autouse=True)
def _quick() -> None:
    os.environ.update(QUICK)


@pytest.fixture(scope="session")
def perturb() -> Callable[..., None]:
    """perturb(policy, scale, seed=0) adds noise to all weights, the same on every device."""

    @torch.no_grad()
    def add_noise(policy: Policy, scale: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in policy.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter), alpha=scale)

    return add_noise


@torch.no_grad()
def largest_difference(policy: Policy, rollouts: pa.Table) -> float:
    """Largest |stored − transformers' log-probability| over the rollouts' tokens, in nats."""
    worst = 0.0
    for row in rollouts.to_pylist():
        ids = torch.tensor([row["prompt_token_ids"] + row["token_ids"]])
        start = len(row["prompt_token_ids"])
        logits = policy.model(ids).logits[0, start - 1 : -1] / row["temperature"]
        own = logits.log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]
        worst = max(worst, (own - torch.tensor(row["logprobs"])).abs().max().item())
    return worst


_UPDATES = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")


class Served:
    """A `vllm serve` of the model on this machine, which tests kill and restart."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._log = folder / f"server-{self.port}.log"
        self._process: subprocess.Popen | None = None

    def start(self, *options: str, updates: bool = True) -> "Served":
        """options: further ones. updates: with the endpoints that change weights and adapters."""
        arguments: dict[str, Any] = {
            "--model": resolve_policy(MODEL),
            "--served-model-name": "policy",
            "--host": "127.0.0.1",
            "--port": self.port,
            "--dtype": "float32",
            "--max-model-len": 1024,
            "--kv-cache-memory-bytes": 2**28,
            "--logprobs-mode": "processed_logprobs",
        }
        # The command `vllm` does not start from the vllm-cpu distribution.
        command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
        command += [str(part) for pair in arguments.items() for part in pair]
        command += ["--no-enable-chunked-prefill", *options]
        with self._log.open("w") as out:
            self._process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | dict.fromkeys(_UPDATES, str(int(updates))),
                start_new_session=True,
            )
        return self

    def wait(self) -> "Served":
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            assert self._process is not None
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{self.url[:-3]}/health", timeout=5):
                    return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise AssertionError(self._log.read_text()[-3000:])

    def running(self) -> bool:
        """True while it works on requests."""
        with urllib.request.urlopen(f"{self.url[:-3]}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return any(
            line.startswith("vllm:num_requests_running{") and float(line.split()[-1]) > 0
            for line in lines
        )

    def kill(self) -> None:
        """SIGKILL the server and its engine process."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def make_server() -> Callable[[Path], Served]:
    return Served


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Served]]:
    """Two servers."""
    folder = tmp_path_factory.mktemp("servers")
    both = [Served(folder).start() for _ in range(2)]
    try:
        for server in both:
            server.wait()
        yield both
    finally:
        for server in both:
            server.kill()


class Lab:
    """A store with problems, and runs of `trace-opd train` in it."""

    model, steps, rollouts = MODEL, STEPS, STEPS * GROUPS * GROUP_SIZE

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, Store(root)
        self._started: list[subprocess.Popen] = []
        config = load_config(REGISTRY["problems"].config_type, CONFIG, ["limit=12"], "problems")
        self.problems = run_stage("problems", config, self.store).ref

    def train(self, *overrides: str, ranks: int = 1) -> subprocess.Popen:
        command = [sys.executable, "-P"]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "trace_opd.pipelines.cli", "train", str(CONFIG)]
        command += ["--store", str(self.root), *TRAIN, *overrides]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )
        self._started.append(process)
        return process

    def ended(self, process: subprocess.Popen, code: int = 0) -> str:
        """Wait for a process to end with the code; return its output on one line."""
        output, _ = process.communicate(timeout=1800)
        assert process.returncode == code, output[-3000:]
        return " ".join(output.split())

    def newest(self) -> Path:
        """The folder of the newest run."""
        return max(self.root.glob("train/*/"), key=lambda path: path.stat().st_ctime)

    def metrics(self) -> list[dict[str, Any]]:
        """The newest run's metrics, one line per step."""
        file = self.newest() / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def run(self) -> Dataset:
        """The newest run, finished."""
        return self.store.get(f"train/{self.newest().name}")

    def table(self, role: str) -> Dataset:
        """A table that the newest run's online steps made."""
        return self.store.get(self.run().summary["tables"][role])

    def check(self, staleness: list[int]) -> None:
        """The newest run has five steps and all rollouts. Log-probabilities equal transformers' in
        the first step and the trainer's in every step whose weights the sampler had.
        """
        metrics = self.metrics()
        assert [line["step"] for line in metrics] == list(range(self.steps))
        assert [line["staleness"] for line in metrics] == staleness
        timed = {"seconds_hand_over", "seconds_probe", "seconds_sample", "sampling_share"}
        assert all(timed <= line.keys() for line in metrics)
        assert ["sampling_overlap" in line for line in metrics] == list(map(bool, staleness))
        rollouts = self.table("rollouts")
        assert rollouts.rows == self.rollouts
        steps = [rollouts.read_part(step) for step in range(self.steps)]
        behind = [
            step - set(table["policy_step"].to_pylist()).pop() for step, table in enumerate(steps)
        ]
        assert behind == staleness
        base = load_policy(resolve_policy(MODEL), "cpu", "float32")
        assert largest_difference(base, steps[0]) < TOLERANCE
        for line, late in zip(metrics, staleness, strict=True):
            # This shows one step of staleness; the engine's rounding is far smaller.
            assert (line["sampler_drift_max"] > TOLERANCE) == bool(late), line

    def wait_for_steps(self, run: subprocess.Popen, steps: int) -> None:
        """Wait until a newly started run has finished that many steps."""
        before = set(self.root.glob("train/*/metrics.jsonl"))
        while run.poll() is None:
            new = set(self.root.glob("train/*/metrics.jsonl")) - before
            if any(len(file.read_text().splitlines()) >= steps for file in new):
                return
            time.sleep(0.02)

    def wait_for_the_middle(self, run: subprocess.Popen, server: Served) -> None:
        """Wait until the run is in its third step and the server is sampling for it."""
        self.wait_for_steps(run, 2)
        while run.poll() is None and not server.running():
            time.sleep(0.02)

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("store"))
    yield made
    made.close()
