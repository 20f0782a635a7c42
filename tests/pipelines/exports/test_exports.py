"""Exports of routed tables: contents, bytes, errors; TRL's form is loaded by TRL."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.exports import FORMATS, Options, export_routed, format_of
from trace_opd.pipelines.models import MICRO
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import Route
from trace_opd.tests.integrations.conftest import GROUPS, PROMPT
from trace_opd.trace.policy import load_tokenizer
from trace_opd.trace.prompt import student_messages, teacher_messages

Export = Callable[..., Path]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def export(store: Store, tmp_path: Path) -> Export:
    def export(form: str, source: str = "fkl", folder: str = "out", **options: Any) -> Path:
        export_routed(form, source, store, tmp_path / folder, Options(**options))
        return tmp_path / folder

    return export


def lines(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def routed(store: Store, name: str = "fkl") -> list[dict[str, Any]]:
    return store.get(name).read().to_pylist()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("form", FORMATS)
def test_equal_datasets_give_equal_bytes_and_a_readme_that_says_what_is_lost(export, form):
    pytest.importorskip("msgspec")
    first, second = (contents(export(form, folder=name)) for name in ("a", "b"))
    assert first == second
    readme = first["README.md"].decode()
    assert "Lost:" in readme
    assert "convert/" in readme


@pytest.mark.parametrize("form", FORMATS)
def test_the_documents_table_names_each_format_and_its_version(form):
    page = (ROOT / "docs" / "other-trainers.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{form}`")]
    version = format_of(form).version.split(" ")[-1]
    assert form == "jsonl" or f"({version})" in row


def test_jsonl_loses_nothing(export, store):
    table = store.get("fkl").read()
    assert pa.Table.from_pylist(lines(export("jsonl")), schema=table.schema).equals(table)


def test_key_spans_are_the_labels_that_trls_sft_trainer_learns(export, store, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import load_dataset

    folder = export("trl")
    dataset = load_dataset(
        "parquet", data_files=str(folder / "sft" / "*.parquet"), split="train",
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    keys = [row for row in routed(store) if row["correct"] and any(row["route"])]
    assert 0 < len(dataset) == len(keys)
    for row, key in zip(dataset, keys, strict=True):
        before = len(key["prompt_token_ids"])
        assert row["input_ids"] == key["prompt_token_ids"] + key["token_ids"]
        learned = [at - before for at, label in enumerate(row["labels"]) if label != -100]
        assert learned == np.flatnonzero(key["route"]).tolist()
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "sft"), max_steps=1, bf16=False, use_cpu=True, report_to=[],
        per_device_train_batch_size=len(keys), save_strategy="no",
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        str(MICRO), args, train_dataset=dataset, processing_class=load_tokenizer(str(MICRO))
    )
    assert trainer.train_dataset["labels"][0] == dataset["labels"][0]
    assert trainer.train().training_loss > 0


def test_trls_grpo_trainer_reads_prompts_and_a_reward_reads_the_columns(export, store, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import load_dataset

    files = str(export("trl") / "grpo" / "*.parquet")
    cache = str(tmp_path / "cache")
    dataset = load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    texts = {row["problem"] for row in store.get("problems").read().to_pylist()}
    assert {row["prompt"][-1]["content"] for row in dataset} == texts
    seen: list[str] = []

    def reward(completions: list, answer: list[str], **_: Any) -> list[float]:
        seen.extend(answer)
        return [float(gold in text[0]["content"]) for text, gold in
                zip(completions, answer, strict=True)]  # fmt: skip

    args = trl.GRPOConfig(
        output_dir=str(tmp_path / "grpo"), max_steps=1, bf16=False, use_cpu=True, report_to=[],
        num_generations=2, per_device_train_batch_size=4, max_completion_length=8,
        save_strategy="no", model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trl.GRPOTrainer(
        str(MICRO), reward, args, dataset, processing_class=load_tokenizer(str(MICRO))
    ).train()
    assert set(seen) <= {row["answer"] for row in store.get("problems").read().to_pylist()}
    assert seen


def test_verls_rows_have_the_fields_of_its_dataset_format(export, store):
    """verl/utils/dataset/README.md of version 0.9: data_source, prompt, ability, reward_model."""
    folder = export("verl")
    rows = pq.read_table(folder / "rl").to_pylist()
    problems = {row["problem_id"]: row for row in store.get("problems").read().to_pylist()}
    assert len(rows) == GROUPS
    for index, row in enumerate(rows):
        problem = problems[row["extra_info"]["problem_id"]]
        assert row["data_source"] == problem["source"]
        assert row["prompt"] == student_messages(PROMPT, problem["problem"])
        assert row["reward_model"] == {"style": "rule", "ground_truth": problem["answer"]}
        assert row["extra_info"]["index"] == index
        assert isinstance(row["ability"], str)
    answers = pq.read_table(folder / "sft").to_pylist()
    correct = [row for row in routed(store) if row["correct"] and not row["truncated"]]
    assert [row["rollout_id"] for row in answers] == [row["rollout_id"] for row in correct]
    responses = {r["rollout_id"]: r["response"] for r in store.get("rollouts").read().to_pylist()}
    for row in answers:
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert row["messages"][-1]["content"] == responses[row["rollout_id"]]


@pytest.mark.parametrize("name", ["fkl", "rkl"])
def test_ms_swifts_turns_join_to_the_response_and_lose_on_routed_text_alone(export, store, name):
    """Fields of its custom-dataset page, version 4.6: messages (role, content, loss),
    teacher_prompt, solution."""
    folder = export("ms-swift", name)
    rows = lines(folder / f"gkd-{name}")
    route = int(Route[name.upper()])
    keys = [row for row in routed(store, name) if route in row["route"]]
    responses = {r["rollout_id"]: r["response"] for r in store.get("rollouts").read().to_pylist()}
    assert 0 < len(rows) == len(keys)
    for row, key in zip(rows, keys, strict=True):
        asked, *turns = row["messages"]
        assert asked == student_messages(PROMPT, key["problem"])[-1]
        assert "".join(turn["content"] for turn in turns) == responses[key["rollout_id"]]
        assert {turn["role"] for turn in turns} == {"assistant"}
        marked = "".join(turn["content"] for turn in turns if turn["loss"])
        # A token of the micro policy is a character, or a special token without text.
        text = responses[key["rollout_id"]]
        assert marked == "".join(c for c, r in zip(text, key["route"], strict=False) if r == route)
        teacher = teacher_messages(PROMPT, key["problem"], key["diagnostic_type"])
        assert row["teacher_prompt"] == teacher[-1]["content"]
    prompts = lines(folder / "grpo")
    assert len(prompts) == GROUPS
    assert all(set(row) == {"messages", "solution"} for row in prompts)


def prime_rl_batches(folder: Path) -> list[list[Any]]:
    """Read as prime-rl's receiver does: MicroBatch of src/prime_rl/transports/rollouts/types.py,
    version 0.8, without the fields of images and experts' routes, which are null."""
    msgspec = pytest.importorskip("msgspec")
    floats = list[float]
    fields: list[Any] = [
        ("input_ids", list[int]), ("loss_mask", list[bool]), ("advantages", floats),
        ("inference_logprobs", floats), ("position_ids", list[int]),
        ("sequence_lengths", list[int]), ("temperatures", floats), ("env_names", list[str]),
        ("seq_lens", list[int]), ("ref_logprobs", floats | None, None),
        ("routed_experts", None, None), ("mm_kwargs", None, None),
        ("mm_token_type_ids", list[int] | None, None), ("rl_weights", floats | None, None),
        ("ce_weights", floats | None, None), ("ref_kl_weights", floats | None, None),
    ]  # fmt: skip
    struct = msgspec.defstruct("MicroBatch", fields, array_like=True, omit_defaults=True)
    decoder = msgspec.msgpack.Decoder(type=list[struct])
    steps = range(len(list((folder / "rollouts").iterdir())))
    files = [folder / "rollouts" / f"step_{step}" / "rank_0.bin" for step in steps]
    return [decoder.decode(file.read_bytes()) for file in files]


def test_prime_rls_receiver_reads_a_step_of_groups(export, store):
    steps = prime_rl_batches(export("prime-rl", groups_per_step=1))
    assert len(steps) == GROUPS
    batches = [batch for step in steps for batch in step]
    rows = routed(store)
    assert len(batches) == len(rows)
    for batch, row in zip(batches, rows, strict=True):
        before, total = len(row["prompt_token_ids"]), len(batch.input_ids)
        assert batch.input_ids == row["prompt_token_ids"] + row["token_ids"]
        assert batch.inference_logprobs[before:] == row["logprobs"]
        assert batch.advantages[before:] == [row["advantage"]] * (total - before)
        assert batch.loss_mask == [at >= before for at in range(total)]
        assert batch.sequence_lengths == batch.seq_lens == [total]
        for stream in (batch.position_ids, batch.temperatures, batch.env_names):
            assert len(stream) == total
        # Forward KL is lost: its tokens are GRPO's, weight 1 where no stream is given.
        assert batch.rl_weights is batch.ref_kl_weights is batch.ref_logprobs is None


def test_prime_rl_gets_reverse_kl_from_scores(export, store, scores: Dataset):
    (batches,) = prime_rl_batches(export("prime-rl", "rkl", scores="scores"))
    known = {row["rollout_id"]: row for row in scores.read().to_pylist()}
    distilled = 0
    for batch, row in zip(batches, routed(store, "rkl"), strict=True):
        at = np.flatnonzero(np.asarray(row["route"]) == int(Route.RKL))
        if not len(at):
            assert batch.rl_weights is None
            continue
        distilled += len(at)
        weights = np.zeros(len(batch.input_ids))
        weights[len(row["prompt_token_ids"]) + at] = 1
        assert batch.ref_kl_weights == weights.tolist()
        assert batch.rl_weights == (1 - weights).tolist()
        taught = np.asarray(batch.ref_logprobs)[weights > 0]
        assert taught.tolist() == known[row["rollout_id"]]["logprobs"]
    assert distilled > 0


@pytest.mark.parametrize(
    ("form", "source", "options", "sentence"),
    [
        ("jsonl", "fkl", {"scores": "scores"}, "--scores: format jsonl does not read it"),
        ("trl", "fkl", {"groups_per_step": 2}, "--groups-per-step: format trl"),
        ("trl", "rollouts", {}, "rollouts"),
        ("trl", "nothing", {}, "nothing"),
        ("ms-swift", "fkl", {"policy": "nowhere"}, "policy nowhere: is not there"),
        ("prime-rl", "fkl", {"scores": "scores"}, "score the dataset that you export"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence_and_leaves_nothing(
    export, scores, tmp_path, form, source, options, sentence
):
    pytest.importorskip("msgspec")
    with pytest.raises(InputError, match=sentence) as raised:
        export(form, source, **options)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_overwritten(export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(InputError, match="is there already"):
        export("jsonl")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_rollouts_that_do_not_say_their_prompt_are_one_sentence(export, store, monkeypatch):
    config = {"import": {"layout": "rollouts", "file": "made.jsonl"}}
    manifest = Dataset.input
    monkeypatch.setattr(
        Dataset,
        "input",
        lambda self, role: (
            replace(found := manifest(self, role), manifest=found.manifest | {"config": config})
            if role == "rollouts"
            else manifest(self, role)
        ),
    )
    with pytest.raises(InputError, match="does not say its prompt"):
        export("verl")


def test_the_command_prints_rows_and_names_its_new_form(store, tmp_path, monkeypatch, capsys):
    root = ["--store", str(store.files.url("")).rstrip("/")]

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trace-opd", "export", *words, *root])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    code, out, err = run("trl", "fkl", str(tmp_path / "out"))
    assert code == 0, err
    assert f"grpo {GROUPS}, sft " in out
    code, _, err = run("some-run", "folder")
    assert code == 2
    assert "`trace-opd export model some-run folder`" in err
    code, _, err = run("ttrl", "fkl", "folder")
    assert code == 2
    assert "did you mean trl?" in err
    code, _, err = run("trl", "fkl", "folder", "--dtype", "bfloat16")
    assert code == 2
    assert "--dtype: format trl does not read it" in err
