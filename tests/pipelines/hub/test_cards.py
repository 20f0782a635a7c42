"""Cards: what the Hub reads of them, what a reader sees, and what they never hold."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard

from trace_opd.data.store import Dataset, Draft, Store
from trace_opd.pipelines.hub.cards import size_category
from trace_opd.pipelines.hub.contents import Contents, contents
from trace_opd.pipelines.hub.public import figures, public, renamed
from trace_opd.schemas.contract import description
from trace_opd.schemas.tables import CONTRACTS
from trace_opd.tests.schemas.test_tables import ROWS

ROLES = ("problems", "rollouts", "verdicts", "annotations", "routed", "evaluation")
TABLES = [f"demo-{role}" for role in ROLES]


def collected(dataset: Dataset, store: Store, license_id: str | None = None) -> Contents:
    with ExitStack() as held:
        return contents(dataset, store, "me/data", license_id, held)


def card_of(found: Contents) -> str:
    content = found.files["README.md"]
    assert isinstance(content, bytes)
    return content.decode()


@pytest.mark.parametrize("alias", TABLES)
def test_a_dataset_s_card_says_what_it_holds_and_what_it_was_made_from(alias, store):
    dataset = store.get(alias)
    text = card_of(collected(dataset, store, "mit"))
    card = DatasetCard(text)
    assert card.data.license == "mit"
    assert card.data.size_categories == ["n<1K"]
    assert card.data.tags == ["trace-opd", dataset.manifest["table"]]
    (config,) = card.data.to_dict()["configs"]
    assert config["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    for field in dataset.read_part(0).schema:
        assert f"| `{field.name}` |" in text
        assert description(field).replace("|", "\\|") in text
    for _, _, node in dataset.lineage():
        assert f"| `{node.ref}` |" in text
    assert f"{dataset.rows:,} rows" in text
    # The same bytes again: a second push changes nothing.
    assert card_of(collected(dataset, store, "mit")) == text


def test_an_annotations_card_names_the_annotator_and_its_cost(store):
    text = card_of(collected(store.get("demo-annotations"), store))
    summary = store.get("demo-annotations").summary
    assert f"was answered by rule: {summary['prompt_tokens']} prompt tokens" in text
    assert f"{summary['cost_usd']:.4f} US dollars" in text


@pytest.mark.parametrize("alias", [*TABLES, "demo-train"])
def test_no_file_of_a_repository_names_a_place_on_this_machine(alias, store, root, tmp_path):
    found = collected(store.get(alias), store)
    found.write(tmp_path / "out")
    places = {str(root), str(Path.home()), str(Path(__file__).parents[3])} - {"/"}
    for path in (tmp_path / "out").rglob("*"):
        if path.suffix in (".md", ".json", ".jinja"):
            text = path.read_text()
            assert not [place for place in places if place in text], path.name


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_table_of_every_contract_loads_with_its_columns(name, tmp_path):
    contract = CONTRACTS[name]
    if name not in ROWS:
        pytest.skip("results, which have no row to try")
    store = Store(tmp_path / "store")
    draft = store.begin("some-stage", {}, {}, contract)
    assert isinstance(draft, Draft)
    table = contract.table([ROWS[name] | {contract.row_id: "id"}])
    draft.write_part(0, table)
    found = collected(draft.finish(1), store)
    found.write(tmp_path / "out")
    loaded = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == table.column_names
    assert loaded[0] == table.to_pylist()[0]


def test_a_model_s_card_has_base_method_command_and_config(store):
    run = store.get("demo-train")
    text = card_of(collected(run, store, "apache-2.0"))
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    results = {one.metric_type: one.metric_value for one in card.data.eval_results}
    trained = store.get("demo-evaluation").summary["policies"]["trained"]
    assert results["avg@4"] == round(trained["avg@4"]["value"], 4)
    config = yaml.safe_load(text.partition("<details><summary>train.yaml</summary>")[2]
                            .split("```")[1].removeprefix("yaml"))  # fmt: skip
    assert config["optim"]["lr"] == run.manifest["config"]["optim"]["lr"]
    assert "trace-opd train train.yaml" in text


def test_a_model_without_evaluation_says_so(store, tmp_path):
    run = store.get("demo-train")
    alone = Store(tmp_path)
    text = card_of(collected(run, alone))
    assert "The run was not evaluated on held-out problems." in text
    assert "model-index" not in text


def test_places_addresses_and_keys_are_left_out_and_ids_stay():
    config = {
        "policy": {"path": "Qwen/Qwen3-0.6B"},
        "teacher": {"model": {"path": "/home/someone/models/big"}},
        "annotator": {
            "base_url": "http://10.1.2.3:8000/v1", "api_key_env": "MY_KEY", "model": "m",
            "engine": "./mine.py:Annotator", "options": {"api_key": "sk-1", "hf_token": "hf_1"},
        },
        "source": {"path": ["s3://bucket/a.jsonl", "~/b.jsonl", "data/c.jsonl", "C:\\x\\d.csv"]},
        "files": "hf://datasets/Qwen/ProcessBench/gsm8k.json",
        "sampling": {"max_new_tokens": 8, "temperature": 1.0},
        "routing": {"key": "fkl"},
        "sampler": {"base_url": ["http://a/v1"], "weights_folder": "/mnt/x"},
    }  # fmt: skip
    assert public(config) == {
        "policy": {"path": "Qwen/Qwen3-0.6B"},
        "teacher": {"model": {"path": "big"}},
        "annotator": {"model": "m", "engine": "mine.py:Annotator", "options": {}},
        "source": {"path": ["a.jsonl", "b.jsonl", "data/c.jsonl", "d.csv"]},
        "files": "hf://datasets/Qwen/ProcessBench/gsm8k.json",
        "sampling": {"max_new_tokens": 8, "temperature": 1.0},
        "routing": {"key": "fkl"},
        "sampler": {},
    }


def test_figures_leave_out_long_lists():
    summary = {"rows": 3, "per_part": [1], "first": list(range(99)), "status": {"ok": 2}}
    assert figures(summary) == {"rows": 3, "status": {"ok": 2}}


def test_settings_of_a_model_name_the_base_and_not_its_folder():
    settings = {"base_model_name_or_path": "/cache/snapshots/1", "inner": {"_name_or_path": "/a"}}
    assert renamed(json.loads(json.dumps(settings)), "owner/base") == {
        "base_model_name_or_path": "owner/base",
        "inner": {"_name_or_path": "owner/base"},
    }


@pytest.mark.parametrize(
    ("rows", "category"),
    [
        (1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10_000, "10K<n<100K"),
        (999_999, "100K<n<1M"), (1_000_000, "1M<n<10M"), (5 * 10**9, "1B<n<10B"),
    ],
)  # fmt: skip
def test_the_size_is_the_hub_s_category(rows, category):
    assert size_category(rows) == category
