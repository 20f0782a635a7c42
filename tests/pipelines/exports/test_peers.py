"""Exports as verl and ms-swift load them, with their own classes.

Skipped where they are not installed: each has dependencies that conflict with another's, so they go
into an environment of their own. CI checks their forms in test_exports.py.
"""

from pathlib import Path
from typing import Any

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.exports import Options, export_routed
from trace_opd.pipelines.models import MICRO
from trace_opd.tests.integrations.conftest import GROUPS, PROMPT
from trace_opd.trace.policy import load_tokenizer
from trace_opd.trace.prompt import student_messages, teacher_messages


@pytest.fixture
def exported(store: Store, tmp_path: Path) -> Any:
    def exported(form: str, name: str = "fkl") -> Path:
        export_routed(form, name, store, tmp_path / form, Options())
        return tmp_path / form

    return exported


def test_verl_reads_prompts_and_conversations(exported, store, tmp_path):
    dataset = pytest.importorskip("verl.utils.dataset", reason="verl 0.9.1 is not installed")
    from omegaconf import OmegaConf
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    folder, tokenizer = exported("verl"), load_tokenizer(str(MICRO))
    config = OmegaConf.create({"cache_dir": str(tmp_path / "cache"), "max_prompt_length": 64})
    files = [str(file) for file in sorted((folder / "rl").glob("*.parquet"))]
    rows = dataset.RLHFDataset(files, tokenizer, config)
    assert len(rows) == GROUPS
    problems = {row["problem_id"]: row for row in store.get("problems").read().to_pylist()}
    for index in range(GROUPS):
        row = rows[index]
        problem = problems[row["extra_info"]["problem_id"]]
        assert row["raw_prompt"] == student_messages(PROMPT, problem["problem"])
        assert row["reward_model"]["ground_truth"] == problem["answer"]
        assert row["index"] == index
    settings = {"max_length": 256, "truncation": "error", "pad_mode": "no_padding",
                "ignore_input_ids_mismatch": True}  # fmt: skip
    files = [str(file) for file in sorted((folder / "sft").glob("*.parquet"))]
    answers = MultiTurnSFTDataset(files, tokenizer, OmegaConf.create(settings))
    correct = [row for row in store.get("fkl").read().to_pylist() if row["correct"]]
    assert len(answers) == len(correct) > 0
    learned = answers[0]["input_ids"][answers[0]["loss_mask"].bool()]
    responses = {r["rollout_id"]: r["response"] for r in store.get("rollouts").read().to_pylist()}
    text = tokenizer.decode(learned, skip_special_tokens=True)
    assert text.strip() == responses[correct[0]["rollout_id"]].strip()


@pytest.mark.parametrize("name", ["fkl", "rkl"])
def test_ms_swift_keeps_the_teachers_prompt_and_where_the_loss_is(exported, store, name):
    preprocessor = pytest.importorskip(
        "swift.dataset.preprocessor", reason="ms-swift 4.6.0 is not installed"
    )
    from datasets import load_dataset
    from swift.rl_core.data import GKDSample

    folder = exported("ms-swift", name)
    files = str(folder / f"gkd-{name}" / "*.jsonl")
    raw = load_dataset("json", data_files=files, split="train", cache_dir=str(folder / "cache"))
    made = preprocessor.AutoPreprocessor()(raw, load_from_cache_file=False, strict=True)
    route = {"fkl": 1, "rkl": 2}[name]
    keys = [row for row in store.get(name).read().to_pylist() if route in row["route"]]
    assert len(made) == len(keys) > 0
    for row, key in zip(made, keys, strict=True):
        losses = [turn["loss"] for turn in row["messages"] if turn["role"] == "assistant"]
        assert True in losses
        sample = GKDSample(messages=row["messages"], teacher_prompt=row["teacher_prompt"])
        assert sample.build_teacher_view()
        asked = [turn for turn in sample.teacher_messages if turn["role"] == "user"]
        teacher = teacher_messages(PROMPT, key["problem"], key["diagnostic_type"])
        assert asked[-1]["content"] == teacher[-1]["content"]
        assert [t for t in sample.teacher_messages if t["role"] == "assistant"] == [
            turn for turn in row["messages"] if turn["role"] == "assistant"
        ]
