"""`trace-opd probe` of annotated datasets: micro with the rule, a chat model with an endpoint."""

import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trace_opd.data.store import Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.probe.page import data
from trace_opd.pipelines.probe.probe import probe
from trace_opd.pipelines.viewer.rollout_tables import TRUST
from trace_opd.schemas.errors import InputError
from trace_opd.tests.pipelines.conftest import PaidServer, completion

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs" / "micro.yaml")
OTHER = str(ROOT / "studies" / "micro-bases" / "step-800")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}hm{% endif %}{% endif %}"
)
MARKED = '{"abstain": false, "spans": [{"segments": [0], "quote": null}], "type": "setup"}'


def trace_opd(*words: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trace-opd", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code


def stages(root: Path, *steps: tuple[str, ...]) -> Store:
    for step in steps:
        trace_opd(*step, "--store", root)
    return Store(root)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A store with a small annotated run of two parts; tests copy it before they add to it."""
    root = tmp_path_factory.mktemp("probe") / "store"
    stages(
        root,
        ("problems", CONFIG, "limit=4", "rows_per_part=2"),
        ("rollout", CONFIG, "group_size=4"),
        ("verify", CONFIG),
        ("annotate", CONFIG),
    )
    return root


@pytest.fixture
def store(made, tmp_path) -> Store:
    return Store(shutil.copytree(made, tmp_path / "store"))


def test_the_student_is_the_dataset_and_the_teacher_is_sampled(made):
    store = Store(made)
    found = probe("annotations", store, samples=2)
    assert (found.problems, found.rollouts, found.groups_of, found.samples) == (4, 16, 4, 2)
    assert not found.anew
    assert found.policy == "micro"
    assert found.prompts == f"of {store.get('rollouts').ref}, its own teacher template"
    correct = store.get("verdicts").read()["correct"].to_pylist()
    figures = found.figures
    assert figures["pass_rate"].value == sum(correct) / 16
    groups = [sum(correct[at : at + 4]) for at in range(0, 16, 4)]
    assert figures["signal"].value == sum(0 < right < 4 for right in groups) / 4
    labelled = store.get("annotations").read()["diagnostic_type"]
    assert found.labelled == len(labelled) - labelled.null_count
    # The hint takes the noise of its own type away, not that of another one.
    assert figures["right_label_key"].value > 10 * figures["wrong_label_key"].value
    assert figures["right_label_length"].value == pytest.approx(1, abs=0.1)
    assert all(one.low <= one.value <= one.high for one in figures.values())
    assert data(probe("annotations", store, samples=2)) == data(found)


def test_fewer_problems_are_spread_over_the_dataset(made):
    store = Store(made)
    found = probe("annotations", store, problems=2, samples=2)
    assert (found.problems, found.rollouts) == (2, 8)
    verdicts = store.get("verdicts").read()
    chosen = [0, 1, 2, 3, 8, 9, 10, 11]  # the groups of problems 0 and 2, of two parts
    right = sum(verdicts["correct"].to_pylist()[row] for row in chosen)
    assert found.figures["pass_rate"].value == right / 8


def test_another_policy_samples_responses_of_its_own(made, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("prompt: {student: '{problem}'}\nonline: {steps: 1}\n")
    found = probe("annotations", Store(made), 2, 3, policy=OTHER, config=str(mine))
    assert found.anew
    assert (found.policy, found.groups_of) == ("step-800", 3)
    assert found.prompts == f"of {mine}, default teacher template"
    assert found.figures["pass_rate"].value * 6 == pytest.approx(
        round(found.figures["pass_rate"].value * 6)
    )


def test_the_command_prints_what_its_json_holds(made, capsys):
    words = ["probe", "--problems", "2", "--samples", "2", "--store", str(made)]
    trace_opd(*words, "--json")
    document = json.loads(capsys.readouterr().out)
    trace_opd(*words)
    printed = capsys.readouterr().out
    assert document["annotations"] == Store(made).get("annotations").ref
    for finding in document["findings"]:
        assert f"{finding['region']}: {finding['text']}" in printed
    assert f"preset: {document['preset']}" in printed
    assert f"{100 * document['figures']['pass_rate']['value']:.1f} (" in printed
    lines = [line for line in printed.splitlines() if line.startswith("KL ") and ":" not in line]
    assert [line[:17].strip() for line in lines] == [
        "KL on key spans",
        "KL on error spans",
        "KL elsewhere",
    ]
    assert all(line.count("(") == 2 and len(line) <= 80 for line in lines)  # nothing is wrapped


def test_responses_of_a_selection_are_probed(store):
    stages(Path(store.root), ("select", "budget=8"), ("annotate", CONFIG, "verdicts=selection"))
    found = probe("annotations", store, samples=2)
    assert (found.problems, found.rollouts) == (4, 16)
    assert 0 < found.labelled <= 8


def chat_model(folder: Path) -> str:
    """A small Llama with random weights, a token per byte and a chat template, as SmolLM2 has."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, eos_token_id=len(vocab) - 1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_a_chat_model_with_annotations_of_an_endpoint(tmp_path, paid_server: PaidServer):
    paid_server.answer = lambda body: completion(body, MARKED)
    model = chat_model(tmp_path / "model")
    paid = f"annotator={{engine: openai, model: m, api_key_env: null, base_url: {paid_server.url}}}"
    store = stages(
        tmp_path / "store",
        ("problems", "source={kind: word-problems, steps: 2}", "limit=2"),
        (
            "rollout", f"policy.path={model}", "group_size=3", "sampling.max_new_tokens=24",
            "sampling.temperature=0.6", "prompt.system=''", "prompt.thinking=false",
            "prompt.teacher_thinking=true", "prompt.examples=[{problem: a, response: b}]",
        ),
        ("verify",),
        ("annotate", paid),
    )  # fmt: skip
    asked = paid_server.asked
    found = probe("annotations", store, samples=2)
    assert paid_server.asked == asked > 0
    assert found.labelled == 6
    assert found.prompts.endswith("default teacher template")
    figures = found.figures
    assert figures["pass_rate"].value == figures["right_label_pass_rate"].value == 0
    assert figures["right_label_error"].value > 0
    assert figures["right_label_key"].as_json() == {"value": None, "ci95": None}
    assert found.advice.preset in ("grpo", "trace-rkl")
    assert json.dumps(data(found), allow_nan=False)


def refusal(store: Store, **options) -> str:
    with pytest.raises(InputError) as error:
        probe("annotations", store, samples=2, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_costs_money_or_runs_code_of_a_store_is_refused(store, write, monkeypatch):
    write("def reward(problem, response, answer, metadata):\n    return float('1' in response)\n")
    root = Path(store.root)
    stages(root, ("verify", "reward={engine: 'own.py:reward'}"), ("annotate", CONFIG))
    assert f"(own.py:reward); read that code, then set {TRUST}=1" in refusal(store)
    monkeypatch.setenv(TRUST, "1")
    assert probe("annotations", store, problems=1, samples=2).problems == 1
    manifest = root / store.get("verdicts").ref / "manifest.json"
    judge = {"name": "judge", "model": "m", "base_url": "http://127.0.0.1:9/v1"}
    written = json.loads(manifest.read_text())
    written["config"] = {"rewards": [judge]}
    manifest.write_text(json.dumps(written))
    assert "judge of verify.rewards asks an endpoint, and probe pays" in refusal(store)


def test_without_labels_there_is_nothing_to_probe(store):
    stages(Path(store.root), ("annotate", "annotator={engine: none}"))
    assert "none of the 16 responses probed has a span with a label" in refusal(store)


def test_responses_of_unknown_origin_are_refused(store):
    rollouts = Path(store.root) / "rows.parquet"
    pq.write_table(store.get("rollouts").read(), rollouts)
    stages(Path(store.root), ("import", "rollouts", str(rollouts), "--of", "problems", "--alias",
           "rollouts"), ("verify", CONFIG), ("annotate", CONFIG))  # fmt: skip
    assert "was not made by `trace-opd rollout`" in refusal(store)


def test_a_policy_of_another_vocabulary_is_refused(store, tmp_path):
    assert "has another vocabulary" in refusal(store, policy=chat_model(tmp_path / "model"))
