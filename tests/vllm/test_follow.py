"""Engines that sample for a trainer: five online steps each, and failures that must not be silent.

Run by `make test-vllm`.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.probe import Probe
from trace_opd.pipelines.samplers.vllm import VllmPolicySampler
from trace_opd.pipelines.samplers.vllm_servers import VllmServersSampler
from trace_opd.pipelines.training.validation import read_validation
from trace_opd.schemas.configs import OpenAISampler, PromptConfig, SamplingConfig, VllmSampler
from trace_opd.schemas.errors import InputError
from trace_opd.trace.packing import PackedModel
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.prompt import student_prompt
from trace_opd.trace.trained import Trained

ENGINE = "sampler={engine: vllm, kv_cache_gib: 0.25, max_model_len: 1024}"
SPANS = ["online.routing={key: fkl, error: rkl}"]
MODEL = os.environ.get("VLLM_TEST_MODEL", "smollm2")
# Nats, float32. Measured: 6e-5 at most on SmolLM2-135M.
TOLERANCE = 5e-4
PLAIN = SamplingConfig(max_new_tokens=16)
PROBLEMS = ["4821+3977", "12+99"]

pytestmark = pytest.mark.slow


def test_five_steps_in_process(lab: Any) -> None:
    lab.ended(lab.train(ENGINE, "seed=1"))
    lab.check([0] * lab.steps)


def test_the_engine_answers_held_out_problems_by_the_current_weights(lab: Any) -> None:
    validation = f"validation={{problems: {{test: {lab.problems}}}, every: 1, k: 2}}"
    lab.ended(lab.train(ENGINE, "seed=6", "online.steps=1", "optim.lr=1.0e-3", validation))
    rows = read_validation(lab.run()).to_pylist()
    assert {(row["step"], row["decoding"]) for row in rows} == {
        (step, decoding) for step in (0, 1) for decoding in ("sampled", "greedy")
    }
    before, after = (
        [row["entropy"] for row in rows if (row["step"], row["decoding"]) == (step, "sampled")]
        for step in (0, 1)
    )
    assert None not in before
    assert before != after
    # Greedy answers of held-out problems are verified but never trained on.
    assert {row["tokens"] for row in rows if row["decoding"] == "greedy"} == {None}


def test_the_same_engine_annotates_in_the_same_step(lab: Any) -> None:
    if lab.model == "micro":
        pytest.skip("its vocabulary can't write JSON")
    annotator = "online.annotator={engine: self, max_new_tokens: 100, max_spans: 1}"
    lab.ended(lab.train(ENGINE, "seed=2", "online.steps=1", *SPANS, annotator))
    annotations = lab.table("annotations").read()
    assert len(annotations) == lab.rollouts // lab.steps
    assert set(annotations["status"].to_pylist()) <= {"ok", "abstain"}


def test_one_step_ahead_with_an_engine_in_a_process_of_its_own(lab: Any) -> None:
    lab.ended(lab.train(ENGINE, "seed=3", "online.max_staleness=1"))
    lab.check([0] + [1] * (lab.steps - 1))


def test_a_run_signalled_together_with_its_engine_keeps_its_steps_and_resumes(lab: Any) -> None:
    """Slurm and Ctrl-C signal all processes of a job at once."""
    arguments = (ENGINE, "seed=6", "online.max_staleness=1", "checkpoint_every=1000")
    run = lab.train(*arguments)
    lab.wait_for_steps(run, 2)
    for process in (*psutil.Process(run.pid).children(recursive=True), run):
        process.terminate()
    assert "a checkpoint is written; to continue" in lab.ended(run, code=143)
    done = lab.metrics()
    lab.ended(lab.train(*arguments))
    assert lab.metrics()[: len(done)] == done  # seconds too: no step was repeated
    assert [line["step"] for line in lab.metrics()] == list(range(lab.steps))


def test_five_steps_with_servers_of_which_one_is_killed_in_the_middle(
    lab: Any, servers: list[Any]
) -> None:
    urls = ", ".join(server.url for server in servers)
    run = lab.train(f"sampler={{engine: openai, base_url: [{urls}], timeout_s: 300}}", "seed=4")
    lab.wait_for_the_middle(run, servers[0])
    servers[0].kill()
    assert "left out" in lab.ended(run)
    lab.check([0] * lab.steps)
    servers[0].start().wait()


def test_a_run_whose_last_server_died_goes_on_when_it_is_back(lab: Any, servers: list[Any]) -> None:
    sampler = f"sampler={{engine: openai, base_url: '{servers[0].url}', timeout_s: 300}}"
    run = lab.train(sampler, "seed=5")
    lab.wait_for_the_middle(run, servers[0])
    servers[0].kill()
    assert "cannot be reached" in lab.ended(run, code=2)
    servers[0].start().wait()
    lab.ended(lab.train(sampler, "seed=5"))
    lab.check([0] * lab.steps)


@pytest.fixture
def student() -> Policy:
    return load_policy(resolve_policy(MODEL), "cpu", "float32")


@pytest.fixture
def probe(student: Policy) -> Probe:
    return Probe(student.tokenizer, PromptConfig(), PROBLEMS)


def trained(policy: Policy) -> Trained:
    return Trained(policy, PackedModel(policy.model))


def follow(sampler: VllmPolicySampler | VllmServersSampler, policy: Policy, probe: Probe) -> None:
    probe.ask(trained(policy))
    sampler.follow(trained(policy), probe)


def test_a_hand_over_that_is_withheld_stops_the_run(
    student: Policy, probe: Probe, perturb: Any
) -> None:
    config = VllmSampler(engine="vllm", kv_cache_gib=0.25, max_model_len=1024)
    sampler = VllmPolicySampler(config, resolve_policy(MODEL), "float32", in_process=True)
    follow(sampler, student, probe)
    perturb(student, 1e-5)
    follow(sampler, student, probe)
    sampler._load = lambda policy: None
    perturb(student, 1e-5, seed=1)
    with pytest.raises(InputError, match=r"still has old weights: it shows -?0%"):
        follow(sampler, student, probe)
    sampler.close()


def test_a_server_that_restarts_unseen_gets_the_weights_before_it_is_used(
    servers: list[Any], student: Policy, probe: Probe, tmp_path: Path, perturb: Any
) -> None:
    config = OpenAISampler(engine="openai", base_url=[server.url for server in servers])
    sampler = VllmServersSampler(config, student.tokenizer, tmp_path / "weights", 1.0)
    prompts = [student_prompt(student.tokenizer, PromptConfig(), text) for text in PROBLEMS]
    seeds = [[10 * i + j for j in range(4)] for i in range(len(PROBLEMS))]
    perturb(student, 1e-3)
    follow(sampler, student, probe)
    before = sampler.sample(prompts, PLAIN, seeds)
    servers[1].kill()
    servers[1].start().wait()
    after = sampler.sample(prompts, PLAIN, seeds)
    assert [[row.token_ids for row in group] for group in after] == [
        [row.token_ids for row in group] for group in before
    ]
    scores = sampler._score(servers[1].url, probe.token_ids)
    assert np.abs(np.concatenate(scores) - probe._now).max() < TOLERANCE
    sampler.close()
    assert not (tmp_path / "weights").exists()


def test_servers_that_cannot_follow_are_refused_at_once(
    servers: list[Any], student: Policy, probe: Probe, tmp_path: Path
) -> None:
    tokenizer = student.tokenizer
    config = OpenAISampler(engine="openai", base_url=servers[0].url)
    sampler = VllmServersSampler(config, tokenizer, tmp_path / "weights", 1.0)
    probe.ask(trained(student))
    servers[0].kill()
    with pytest.raises(InputError, match="no server can be reached"):
        sampler.follow(trained(student), probe)
    with pytest.raises(InputError, match="can't be used"):
        VllmServersSampler(config, tokenizer, tmp_path / "weights", 1.0)
    servers[0].start(updates=False).wait()
    with pytest.raises(InputError, match=r"offers no update .* VLLM_SERVER_DEV_MODE=1"):
        VllmServersSampler(config, tokenizer, tmp_path / "weights", 1.0)
