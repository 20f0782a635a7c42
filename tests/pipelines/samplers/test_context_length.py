"""Prompts longer than the policy's context are refused before sampling starts."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import Qwen3Config

from trace_opd.data.store import Store
from trace_opd.pipelines.models import MICRO
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.samplers.context_length import context_length
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.pipelines.stages.train import begin
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config
from trace_opd.schemas.tables import PROBLEMS, ROUTED

CONFIG = Path(__file__).parents[3] / "configs" / "micro.yaml"
LONG = 300


def config_of(stage: str, *overrides: str):
    return load_config(REGISTRY[stage].config_type, CONFIG, list(overrides), stage)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """micro with 200 positions."""
    folder = Path(shutil.copytree(MICRO, tmp_path / "short"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 200}))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two parts of problems; the last problem has 300 characters, one token each."""
    store = Store(tmp_path / "store")
    draft = store.begin("problems", {"made": "here"}, {}, PROBLEMS)
    for part, texts in enumerate((["1+1", "2+2"], ["3+3", "4" * LONG])):
        draft.write_part(part, PROBLEMS.table(
            {"problem_id": f"p{part}-{i}", "problem": text, "answer": "2", "answer_kind": "math",
             "solution": None, "steps": None, "source": "test", "split": "train"}
            for i, text in enumerate(texts)
        ))  # fmt: skip
    store.set_alias("problems", draft.finish(2))
    return store


def start(stage: str, store: Store, *overrides: str) -> None:
    config = config_of(stage, *overrides)
    if stage == "train":
        begin(config, store)
    else:
        REGISTRY[stage].load().begin(config, store)


STAGES = {
    "rollout": ["sampling.max_new_tokens=50"],
    "evaluate": ["problems=problems", "trained=null", "sampling.max_new_tokens=50"],
    "train": ["offline.steps=0", "online.steps=1", "online.sampling.max_new_tokens=50",
              "online.routing.rule=all", "online.routing.teacher_context=peer",
              "online.routing.error=jsd"],
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_the_problem_and_its_tokens_are_named_before_any_work(store, policy, stage):
    message = rf"problem p1-1: its prompt of {LONG + 2} tokens .*max_new_tokens=50 .*200 tokens"
    with pytest.raises(InputError, match=message):
        start(stage, store, f"policy.path={policy}", *STAGES[stage])
    assert {path.name for path in Path(store.root).iterdir()} <= {"problems", "aliases.json"}


@pytest.mark.parametrize(
    ("overrides", "fits"),
    [
        (["policy.path=micro", f"sampling.max_new_tokens={1024 - LONG - 2}"], True),
        (["policy.path=micro", f"sampling.max_new_tokens={1024 - LONG - 1}"], False),
        (["sampler={engine: vllm, max_model_len: 400}", "sampling.max_new_tokens=98"], True),
        (["sampler={engine: vllm, max_model_len: 400}", "sampling.max_new_tokens=99"], False),
        (["prompt.student='{problem} {problem}'", "sampling.max_new_tokens=500"], False),
        (["sampler={engine: openai, base_url: 'http://127.0.0.1:9/v1'}"], True),
    ],
)
def test_prompt_and_response_fill_the_context_and_no_more(store, overrides, fits):
    if fits:
        start("rollout", store, *overrides)
    else:
        with pytest.raises(InputError, match="do not fit into the context"):
            start("rollout", store, *overrides)


@pytest.mark.parametrize(("room", "fits"), [(2 * LONG + 6, True), (2 * LONG + 5, False)])
def test_the_turns_before_a_problem_count(tmp_path, room, fits):
    """Two turns of 300 characters, the problem's one, and a control token a turn and an end."""
    store = Store(tmp_path / "store")
    draft = store.begin("problems", {"made": "here"}, {}, PROBLEMS)
    history = [{"role": role, "content": "4" * LONG} for role in ("user", "assistant")]
    row = {"problem_id": "p", "problem": "1", "answer": "2", "answer_kind": "math",
           "solution": None, "steps": None, "source": "test", "split": "train"}  # fmt: skip
    rows = [row, row | {"problem_id": "q", "history": history}]
    draft.write_part(0, PROBLEMS.table(rows))
    store.set_alias("problems", draft.finish(1))
    limits = [f"sampler={{engine: vllm, max_model_len: {room + 50}}}", "sampling.max_new_tokens=50"]
    if fits:
        start("rollout", store, *limits)
    else:
        with pytest.raises(InputError, match=rf"problem q: its prompt of {2 * LONG + 6} tokens"):
            start("rollout", store, *limits)


def test_routed_rows_of_a_policy_with_a_longer_context_are_refused(tmp_path, policy):
    store = Store(tmp_path / "store")
    for stage, overrides in (
        ("problems", ["limit=2"]), ("rollout", ["group_size=2"]), ("verify", []), ("annotate", []),
        ("convert", ["routing.rule=all"]),
    ):  # fmt: skip
        run_stage(stage, config_of(stage, *overrides), store)
    routed = store.get("routed", ROUTED).read().to_pylist()
    longest = max(routed, key=lambda row: len(row["prompt_token_ids"]) + len(row["token_ids"]))
    length = len(longest["prompt_token_ids"]) + len(longest["token_ids"])
    config = json.loads((policy / "config.json").read_text())
    offline = [f"policy.path={policy}", "offline.steps=1", "online.steps=0"]
    for positions, fits in ((length, True), (length - 1, False)):
        config["max_position_embeddings"] = positions
        (policy / "config.json").write_text(json.dumps(config))
        if fits:
            start("train", store, *offline)
        else:
            with pytest.raises(InputError, match=f"its {length} tokens do not fit"):
                start("train", store, *offline)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 1000),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
          "original_max_position_embeddings": 1000}, 4000),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 2000),
        ({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 125}, 1000),
    ],
)  # fmt: skip
def test_the_context_of_scaled_rotary_embeddings(rope, expected):
    config = Qwen3Config(max_position_embeddings=1000, rope_parameters=rope)
    assert context_length(config) == expected
