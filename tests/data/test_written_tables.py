"""Tables written by hand: imported they convert; damage is a sentence with file, row and field,
where it is imported and where a stage reads a part that was written past the import.
"""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trace_opd.data.store import Store
from trace_opd.data.written_tables import import_file, import_table
from trace_opd.pipelines.cli.commands import app
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.pipelines.stages.base import close_engine
from trace_opd.schemas.configs import AnnotateConfig, ConvertConfig, EvaluateConfig, VerifyConfig
from trace_opd.schemas.configs import RolloutConfig as Rollout
from trace_opd.schemas.errors import InputError, TooManyFailed
from trace_opd.schemas.settings import load_config
from trace_opd.schemas.tables import ANNOTATIONS, CONTRACTS, PROBLEMS, ROLLOUTS, VERDICTS

MICRO = str(Path(__file__).parents[2] / "configs" / "micro.yaml")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A store of the micro policy in two parts: problems to annotations."""
    root = tmp_path_factory.mktemp("made") / "store"
    changes = {
        "problems": ["limit=3", "rows_per_part=2", "source.max_digits=3"],
        "rollout": ["group_size=2", "sampling.max_new_tokens=64"],
    }
    for stage in ("problems", "rollout", "verify", "annotate"):
        given = [MICRO, *changes.get(stage, []), "--store", str(root)]
        app([stage, *given], standalone_mode=False)
    return root


@pytest.fixture
def store(made, tmp_path) -> Store:
    return Store(shutil.copytree(made, tmp_path / "store"))


def rows_of(store: Store, alias: str) -> list[dict]:
    return store.get(alias).read().to_pylist()


def convert(store: Store, annotations: str):
    config = load_config(ConvertConfig, MICRO, [f"annotations={annotations}"], "convert")
    return run_stage("convert", config, store, "converted")


# --- what works ---


@pytest.mark.parametrize("form", ["arrow", "polars", "parquet", "jsonl"])
def test_a_table_with_only_what_people_know_converts_like_the_stages_own(store, tmp_path, form):
    kept = ("rollout_id", "segments", "spans", "diagnostic_type", "status")
    full = [{name: row[name] for name in kept} for row in rows_of(store, "annotations")][::-1]
    schema = pa.schema([ANNOTATIONS.schema.field(name) for name in kept])
    arrow = pa.Table.from_pylist(full, schema=schema)
    if form in ("arrow", "polars"):
        table = arrow if form == "arrow" else pl.DataFrame(arrow)
        import_table(store, "annotations", table, of="verdicts", alias="mine")
    else:
        file = tmp_path / f"mine.{form}"
        if form == "parquet":
            pl.DataFrame(arrow).write_parquet(file)
        else:
            file.write_text("\n".join(map(json.dumps, full)))
        given = ["annotations", str(file), "--of", "verdicts", "--alias", "mine"]
        app(["import", *given, "--store", store.root], standalone_mode=False)
    mine = store.get("mine", ANNOTATIONS)
    assert mine.parts == store.get("annotations").parts == 2
    assert convert(store, "mine").read().equals(convert(store, "annotations").read())
    assert set(mine.manifest["inputs"]) == {"verdicts", "rollouts", "problems"}


def test_the_same_rows_make_the_same_dataset_in_any_order(store):
    table = store.get("annotations").read()
    first = import_table(store, "annotations", table, of="verdicts", alias="a")
    turned = table.take(list(range(len(table)))[::-1])
    assert import_table(store, "annotations", turned, of="verdicts", alias="b").ref == first.ref


def test_rollouts_and_verdicts_of_text_are_imported_and_can_be_annotated(store):
    problems = rows_of(store, "problems")
    texts = [
        {"rollout_id": f"{row['problem_id']}-{k}", "problem_id": row["problem_id"], "response": t}
        for k, t in enumerate(("One.\nTwo.", "Three."))
        for row in problems
    ]
    rollouts = import_table(store, "rollouts", pl.DataFrame(texts), of="problems", alias="texts")
    assert rollouts.parts == 2
    found = sorted((r["problem_id"], r["sample_index"]) for r in rows_of(store, "texts"))
    assert found == sorted((row["problem_id"], k) for row in problems for k in (0, 1))
    judged = [{"rollout_id": row["rollout_id"], "reward": 0.0, "correct": False} for row in texts]
    import_table(store, "verdicts", pl.DataFrame(judged), of="texts", alias="judged")
    config = load_config(AnnotateConfig, MICRO, ["verdicts=judged"], "annotate")
    assert run_stage("annotate", config, store, "marked").rows == len(texts)
    with pytest.raises(InputError, match=r"token ids .* all 6 .*not sampled here.*vLLM"):
        convert(store, "marked")


# --- damage ---


def span(**changes):
    return lambda rows: rows[1]["spans"].__setitem__(0, rows[1]["spans"][0] | changes)


def field(name, value):
    return lambda rows: rows[1].__setitem__(name, value)


DAMAGE = {
    "a missing column": (lambda rows: [r.pop("spans") for r in rows], r": column spans is missing"),
    "an extra column": (lambda rows: [r.update(mood=1) for r in rows], r": column mood is not in"),
    "another type": (lambda rows: [r.update(status=3.5) for r in rows], r"status"),
    "an unknown type label": (field("diagnostic_type", "odd"), r", row 1: diagnostic_type is 'o"),
    "an unknown status": (field("status", "fine"), r", row 1: status is 'fine', not one of ok"),
    "a null": (field("status", None), r", row 1: status is null"),
    "a span of no segment": (span(segments=[]), r", row 1: spans has a span that names no segment"),
    "a span outside": (span(segments=[99]), r", row 1: spans has a span that names no segment"),
    "a span with other bounds": (span(start=1, end=2), r", row 1: spans .*start and end"),
    "a null in a span": (span(start=None), r": column spans is .*\(row 1: "),
    "an unknown kind": (span(kind="good"), r", row 1: spans\.kind is not one of key, error"),
    "a gap between segments": (
        lambda rows: rows[1]["segments"].pop(0), r", row 1: segments does not follow",
    ),
    "a null segment": (
        lambda rows: rows[1]["segments"].insert(0, None), r": column segments is .*\(row 1: ",
    ),
    "a repeated row": (lambda rows: rows.append(rows[0]), r", row \d: rollout_id \w+ appears"),
}  # fmt: skip
CROSS = {
    "segments shorter than the text": (
        lambda rows: [rows[1].update(spans=[]), rows[1]["segments"].pop()],
        r", row 1.*segments (end at|do not tile)",
    ),
    "a missing row": (lambda rows: rows.pop(), r"rollout_id"),
    "another rollout": (field("rollout_id", "other"), r", row 1: rollout_id (is )?other"),
}
both = pytest.mark.parametrize(
    ("damage", "sentence"), (DAMAGE | CROSS).values(), ids=[*DAMAGE, *CROSS]
)


def nullable(kind: pa.DataType) -> pa.DataType:
    """As polars and people write it: everything may be null."""
    if pa.types.is_list(kind):
        return pa.list_(nullable(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(inner.name, nullable(inner.type)) for inner in kind])
    return kind


def written(rows: list[dict]) -> pa.Table:
    kinds = {f.name: nullable(f.type) for f in ANNOTATIONS.schema if f.name != "status"}
    return pa.table({name: pa.array([r[name] for r in rows], kinds.get(name)) for name in rows[0]})


@pytest.fixture
def part(store) -> list[dict]:
    """The first part's rows, of which the second has a span."""
    rows = store.get("annotations").read_part(0).to_pylist()
    return sorted(deepcopy(rows), key=lambda row: not row["spans"])


@both
def test_damage_is_refused_by_import(store, part, tmp_path, damage, sentence):
    rest = store.get("annotations").read_part(1).to_pylist()
    damage(part)
    for row in rest:
        row |= {"mood": 1} if "mood" in part[0] else {}
        row |= {"status": 3.5} if part[0].get("status") == 3.5 else {}
        if "spans" not in part[0]:
            row.pop("spans")
    pq.write_table(written(part + rest), tmp_path / "mine.parquet")
    with pytest.raises(InputError, match=r"^mine\.parquet.*" + sentence) as error:
        import_file(store, "annotations", str(tmp_path / "mine.parquet"), "verdicts", "mine")
    assert "\n" not in str(error.value)
    assert "mine" not in store.aliases()


@both
def test_damage_in_a_part_is_refused_by_convert(store, part, damage, sentence):
    order = [row["rollout_id"] for row in store.get("annotations").read_part(0).to_pylist()]
    spanned = part[1]["rollout_id"]
    part.sort(key=lambda row: order.index(row["rollout_id"]))
    at = order.index(spanned)
    part[1], part[at] = part[at], part[1]  # damage works on row 1
    damage(part)
    if len(part) == len(order):
        part[1], part[at] = part[at], part[1]
    dataset = store.get("annotations")
    pq.write_table(written(part), dataset.path("part-00000.parquet"))
    sentence = sentence.replace("row 1", f"row ({at}|1)")
    file = rf"^({dataset.ref}/)?.*part-00000\.parquet"
    with pytest.raises(InputError, match=rf"{file}.*{sentence}") as error:
        convert(store, "annotations")
    assert "\n" not in str(error.value)


def test_token_ids_that_do_not_spell_the_text_name_file_and_row(store):
    dataset = store.get("rollouts")
    table = dataset.read_part(1)
    texts = pa.array(["another text", *table["response"].to_pylist()[1:]])
    at = table.column_names.index("response")
    pq.write_table(
        table.set_column(at, table.schema.field(at), texts), dataset.path("part-00001.parquet")
    )
    with pytest.raises(InputError, match=r"^rollout/\w+/part-00001\.parquet, row 0,.*token_ids"):
        convert(store, "annotations")


@pytest.mark.parametrize(
    ("name", "of", "rows", "sentence"),
    [
        ("routed", "verdicts", [{}], "table 'routed': is none of rollouts, verdicts, annotations"),
        ("annotations", "rollouts", [{"rollout_id": "x"}], "holds rollouts, this stage needs"),
        ("verdicts", "rollouts", [{"reward": 1.0}], "column rollout_id is missing"),
        ("rollouts", "problems", [{"problem_id": "x"}], "row 0: problem_id x is not in problems/"),
        ("rollouts", "problems", [{"problem_id": 3}], "row 0: problem_id is 3, table rollouts"),
        ("verdicts", "rollouts", [{"rollout_id": "x", "reward": "a"}], "row 0: reward is \"a\""),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_named(store, tmp_path, name, of, rows, sentence):
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=sentence):
        import_file(store, name, str(file), of, "mine")


# --- datasets without what a stage needs ---


def empty(store: Store, made_by: str, contract, inputs: dict, **summary) -> str:
    draft = store.begin(made_by, {"empty": contract.name}, inputs, contract)
    draft.write_part(0, contract.empty())
    dataset = draft.finish(1, summary)
    store.set_alias("empty", dataset)
    return dataset.ref


STAGES = {
    "rollout": (Rollout, "problems", PROBLEMS),
    "verify": (VerifyConfig, "rollouts", ROLLOUTS),
    "annotate": (AnnotateConfig, "verdicts", VERDICTS),
    "convert": (ConvertConfig, "annotations", ANNOTATIONS),
    "evaluate": (EvaluateConfig, "problems", PROBLEMS),
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_empty_dataset_is_refused_by_every_stage_that_reads_it(tmp_path, stage):
    store = Store(tmp_path)
    kind, role, contract = STAGES[stage]
    ref = empty(store, "problems", contract, {}, left_out={"filtered": 40})
    config = load_config(kind, MICRO, [f"{role}=empty"], stage)
    with pytest.raises(InputError, match=rf"dataset 'empty' is empty: .*40 filtered.*{ref}"):
        run_stage(stage, config, store)


def test_an_empty_dataset_names_the_first_one_without_rows(tmp_path):
    store = Store(tmp_path)
    ref = empty(store, "problems", PROBLEMS, {})
    empty(store, "rollout", ROLLOUTS, {"problems": store.get("empty")})
    with pytest.raises(InputError, match=rf"'empty' is empty: so is {ref}, from which it was made"):
        store.get("empty", ROLLOUTS)


def changed(store: Store, alias: str, **values) -> None:
    """Sets columns of all rows of a dataset."""
    dataset = store.get(alias)
    contract = CONTRACTS[dataset.manifest["table"]]
    for index in range(dataset.parts):
        rows = [row | values for row in dataset.read_part(index).to_pylist()]
        pq.write_table(contract.table(rows), dataset.path(f"part-{index:05d}.parquet"))


@pytest.mark.parametrize(
    ("alias", "values", "sentence"),
    [
        ("verdicts", {"reward": None, "correct": None, "status": "timeout"},
         r"^dataset verify/\w+: none of its 6 responses has a reward \(6 timeout\)"),
        ("rollouts", {"on_policy": False, "token_ids": [], "logprobs": []},
         r"^dataset rollout/\w+: token ids .* are missing in all 6 .*transformers returned none"),
        ("annotations", {"spans": [], "diagnostic_type": None, "status": "failed"},
         r"^dataset annotate/\w+: none of its 6 rows is annotated \(6 failed\)"),
    ],
)  # fmt: skip
def test_convert_refuses_what_would_make_an_empty_or_plain_table(store, alias, values, sentence):
    changed(store, alias, **values)
    with pytest.raises(InputError, match=sentence):
        convert(store, "annotations")


def test_convert_warns_of_a_table_that_annotations_leave_to_plain_grpo(store, caplog):
    changed(store, "annotations", spans=[], diagnostic_type=None, status="empty")
    made = convert(store, "annotations")
    assert f"all its {made.summary['tokens']} tokens are plain GRPO's" in caplog.text


def test_the_check_of_converts_inputs_ends_at_the_first_part_with_a_usable_row(store):
    """A fault of a later part is found when that part is made, and the others are kept."""
    for alias in ("rollouts", "verdicts", "annotations"):
        Path(store.get(alias).path("part-00001.parquet")).unlink()
    config = load_config(ConvertConfig, MICRO, section="convert")
    stage = REGISTRY["convert"].load()
    plan, draft = stage.begin(config, store)
    assert stage.make_part(plan, draft, 0) == 0
    with pytest.raises(InputError, match=r"part-00001.parquet: file is gone"):
        stage.make_part(plan, draft, 1)
    assert draft.has_part(0)
    close_engine()


def test_a_verification_that_judges_nothing_stops_the_next_stage(store):
    changed(store, "problems", answer=r"\frac{")
    config = load_config(VerifyConfig, MICRO, ["max_answer_chars=49"], "verify")
    with pytest.raises(TooManyFailed, match=r"none of its 6 .* judged \(6 gold_unparsed\)"):
        run_stage("verify", config, store, "unjudged")
    assert "unjudged" in store.aliases()
