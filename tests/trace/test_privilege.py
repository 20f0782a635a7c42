"""No model reads what annotators and rewards write: the teacher sees one label of an annotation.

Every path to a teacher's prompt runs twice, once with a secret in a field that annotators, rewards
or judges fill freely, or in a problem's metadata. The models must read the same tokens both times.
"""

import ast
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from trace_opd.data.store import Store
from trace_opd.pipelines.annotators.rule import StepsAnnotator
from trace_opd.pipelines.bundled.demonstrations import STUDENT_TEMPLATE, TEACHER_TEMPLATE
from trace_opd.pipelines.bundled.micro import arithmetic_problems, exact_verdicts
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.stages import train
from trace_opd.pipelines.stages.base import close_engine
from trace_opd.pipelines.stages.convert import STAGE as CONVERT_STAGE
from trace_opd.schemas.configs import (
    ConvertConfig,
    OfflineConfig,
    OnlineConfig,
    PromptConfig,
    RoutingConfig,
    RuleAnnotator,
    SegmentConfig,
    TrainConfig,
)
from trace_opd.schemas.contract import validate
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import (
    TYPE_LABELS,
    WORDS,
    DiagnosticType,
    ErrorType,
    TeacherContext,
)
from trace_opd.schemas.tables import (
    ANNOTATIONS,
    PROBLEMS,
    ROLLOUTS,
    ROUTED,
    VERDICTS,
)
from trace_opd.trace import prompt
from trace_opd.trace.align import byte_table
from trace_opd.trace.online import OnlineSource
from trace_opd.trace.policy import Policy, load_policy, load_tokenizer
from trace_opd.trace.routed import routed_table
from trace_opd.trace.sequences import training_sequences
from trace_opd.trace.trainer import Trainer

ROOT = Path(__file__).parents[2]
SECRET = "27182818"  # in the micro policy's vocabulary, so it would be visible
ROUTING = RoutingConfig(key="fkl", error="rkl")
PROMPT = PromptConfig(
    student=STUDENT_TEMPLATE, teacher=TEACHER_TEMPLATE, privileged="{problem} {context}"
)
Row = dict[str, Any]


def in_spans(**fields: Any) -> Callable[[Row], Row]:
    return lambda row: {"spans": [span | fields for span in row["spans"]]}


# Everything that an annotator, its config or its bill can put into a row, except indices and label.
PLANTS: dict[str, Callable[[Row], Row]] = {
    "raw answer": lambda _: {"raw_answer": f'{{"quote": "{SECRET}", "type": "{SECRET}"}}'},
    "error": lambda _: {"error": f"the answer is {SECRET}"},
    "annotator's name": lambda _: {"annotator_name": SECRET},
    "annotator's model": lambda _: {"annotator_model": SECRET},
    "reflection": lambda _: {"reflection": f"the answer is {SECRET}"},
    "prompt version": lambda _: {"prompt_version": SECRET},
    "span text": in_spans(text=SECRET),
    "span offsets": in_spans(start=27182818, end=27182819),
    "bill": lambda _: {
        "prompt_tokens": 27182818,
        "completion_tokens": 27182818,
        "cost_usd": 27182818.0,
        "latency_s": 2718.0,
    },
}
_GRADE = {"repeat": 0, "order": "reference_first", "grade": 3, "status": "ok"}
# Everything that a reward or a judge can put into a verdict, except whether it is right.
REWARD_PLANTS: dict[str, Row] = {
    "feedback": {"feedback": f"the answer is {SECRET}"},
    "judge's reason": {"grades": [_GRADE | {"name": SECRET, "reason": f"it is {SECRET}"}]},
    "part": {"parts": [{"name": SECRET, "value": 1.0, "status": "ok", "seconds": 2718.0}]},
    "answer read": {"parsed_answer": SECRET},
    "verifier": {"verifier": SECRET},
}
METADATA: Row = {"metadata": f'{{"code": {{"tests": "{SECRET}"}}}}'}


@dataclass(frozen=True)
class Tables:
    problems: pa.Table
    rollouts: pa.Table
    verdicts: pa.Table
    annotations: pa.Table

    def planted(self, *names: str) -> "Tables":
        """With a secret in the named fields of annotations."""
        rows = self.annotations.to_pylist()
        return self.annotated(
            row | {key: value for name in names for key, value in PLANTS[name](row).items()}
            for row in rows
        )

    def annotated(self, rows: Iterable[Row]) -> "Tables":
        return replace(self, annotations=ANNOTATIONS.table(rows))

    def rewarded(self, *names: str) -> "Tables":
        """With a secret in the named fields of verdicts."""
        rows = self.verdicts.to_pylist()
        planted = {key: value for name in names for key, value in REWARD_PLANTS[name].items()}
        return replace(self, verdicts=VERDICTS.table(row | planted for row in rows))

    def with_metadata(self) -> "Tables":
        """With a secret in what rewards read of problems."""
        rows = self.problems.to_pylist()
        return replace(self, problems=PROBLEMS.table(row | METADATA for row in rows))


@cache
def tables() -> Tables:
    """Two problems with one correct and one wrong response each, all of them marked."""
    problems = arithmetic_problems(2, 0)
    rollouts = sampled(problems)
    verdicts = exact_verdicts(problems, rollouts)
    annotator = StepsAnnotator(RuleAnnotator(engine="rule"), SegmentConfig())
    marked = annotator.annotate(problems, rollouts, verdicts)
    assert all(row["spans"] for row in marked.to_pylist())
    return Tables(problems, rollouts, verdicts, marked)


def sampled(problems: pa.Table) -> pa.Table:
    policy = fresh_policy()
    rows = []
    for problem in problems.to_pylist():
        right = problem["solution"]
        for index, text in enumerate([right, right.replace("\\boxed{", "\\boxed{1")]):
            ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
            rows.append(
                {
                    "rollout_id": f"{problem['problem_id']}-{index}",
                    "problem_id": problem["problem_id"],
                    "group_id": problem["problem_id"],
                    "sample_index": index,
                    "prompt_token_ids": [1],
                    "token_ids": ids,
                    "logprobs": [-0.5] * len(ids),
                    "response": text,
                    "finish_reason": "stop",
                    "policy_name": "rule",
                    "policy_revision": "r",
                    "policy_step": 0,
                    "vocab_fingerprint": policy.info.vocab_fingerprint,
                    "temperature": 1.0,
                    "top_p": 1.0,
                    "top_k": 0,
                    "max_new_tokens": 96,
                    "seed": index,
                    "on_policy": True,
                }
            )
    return ROLLOUTS.table(rows)


def fresh_policy() -> Policy:
    return load_policy(resolve_policy("micro"), "cpu")


@contextmanager
def read_by_models() -> Iterator[list[list[int]]]:
    """Token ids that any model of the process embeds, in order: student, teacher, sampler."""
    read: list[list[int]] = []

    def keep(module: torch.nn.Module, args: Any) -> None:
        if isinstance(module, torch.nn.Embedding):
            read.append(args[0].flatten().tolist())

    handle = register_module_forward_pre_hook(keep)
    try:
        yield read
    finally:
        handle.remove()


# --- the paths from annotations to models ---


def offline(known: Tables, folder: Path, routing: RoutingConfig = ROUTING) -> list[list[int]]:
    policy = fresh_policy()
    pieces = byte_table(policy.tokenizer)
    routed = routed_table(
        known.problems, known.rollouts, known.verdicts, known.annotations, pieces, routing
    )
    config = TrainConfig(prompt=PROMPT, offline=OfflineConfig(steps=2))
    with read_by_models() as read:
        assert len(list(Trainer(policy, config).run(lambda _: routed, None))) == 2
    return read


def contrast(known: Tables, folder: Path) -> list[list[int]]:
    """The type's teacher against one that reads a solution."""
    routing = {"key": "reweight", "error": "reweight", "contrast_context": "solution"}
    return offline(known, folder, RoutingConfig(**routing))


class PlantedAnnotator:
    """An annotator of the online loop that returns given annotations."""

    def __init__(self, annotations: pa.Table) -> None:
        self._annotations = annotations

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        return self._annotations

    def close(self) -> None:
        """Nothing to release."""


class PlantedVerifier:
    """A verifier of the online loop that returns given verdicts."""

    def __init__(self, verdicts: pa.Table) -> None:
        self._verdicts = verdicts

    def verify(self, problems: pa.Table, rollouts: pa.Table) -> pa.Table:
        return self._verdicts

    def close(self) -> None:
        """Nothing to release."""


def online(known: Tables, folder: Path) -> list[list[int]]:
    policy = fresh_policy()
    source = OnlineSource(
        problems=lambda step, refill: known.problems,
        sample=lambda problems, step: known.rollouts,
        verifier=PlantedVerifier(known.verdicts),
        annotator=PlantedAnnotator(known.annotations),
        bytes=byte_table(policy.tokenizer),
        routing=ROUTING,
        write=lambda step, made: None,
    )
    config = TrainConfig(prompt=PROMPT, online=OnlineConfig(steps=2, group_size=2))
    with read_by_models() as read:
        assert len(list(Trainer(policy, config).run(None, source))) == 2
    return read


def stages(known: Tables, folder: Path) -> list[list[int]]:
    """The stages convert and train, through a store."""
    store = Store(folder)
    inputs: dict = {}
    names = ("problems", "rollout", "verify", "annotate")
    roles = ("problems", "rollouts", "verdicts", "annotations")
    contracts = (PROBLEMS, ROLLOUTS, VERDICTS, ANNOTATIONS)
    made = (known.problems, known.rollouts, known.verdicts, known.annotations)
    for stage, role, contract, table in zip(names, roles, contracts, made, strict=True):
        draft = store.begin(stage, {}, inputs, contract)
        draft.write_part(0, table)
        store.set_alias(role, draft.finish(1))
        inputs = {role: store.get(role)}
    routed = CONVERT_STAGE.run(ConvertConfig(routing=ROUTING), store)
    close_engine()
    store.set_alias("routed", routed)
    assert SECRET not in str(routed.read().to_pylist())
    config = TrainConfig(
        prompt=PROMPT, offline=OfflineConfig(steps=1), groups_per_step=2, tracker="none"
    )
    with read_by_models() as read:
        train.run(config, store)
    return read


PATHS = {"offline": offline, "contrast": contrast, "online": online, "stages": stages}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    return {name: path(tables(), tmp_path_factory.mktemp(name)) for name, path in PATHS.items()}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("path", ["offline", "contrast", "online"])
def test_no_model_reads_what_an_annotator_writes(path, plant, plain, tmp_path):
    assert PATHS[path](tables().planted(plant), tmp_path) == plain[path]


def test_no_model_reads_what_an_annotator_writes_when_the_stages_run(plain, tmp_path):
    # The offsets stay: a file with other offsets is no annotations table.
    names = [name for name in PLANTS if name != "span offsets"]
    assert stages(tables().planted(*names), tmp_path) == plain["stages"]


@pytest.mark.parametrize("path", ["offline", "contrast", "online"])
def test_no_model_reads_what_rewards_and_judges_write(path, plain, tmp_path):
    planted = tables().rewarded(*REWARD_PLANTS).with_metadata()
    assert SECRET in str(planted.verdicts.to_pylist())
    assert SECRET in str(planted.problems.to_pylist())
    assert PATHS[path](planted, tmp_path) == plain[path]


def test_no_model_reads_what_anyone_writes_when_the_stages_run(plain, tmp_path):
    names = [name for name in PLANTS if name != "span offsets"]
    everywhere = tables().planted(*names).rewarded(*REWARD_PLANTS).with_metadata()
    assert stages(everywhere, tmp_path) == plain["stages"]


@pytest.mark.parametrize("path", PATHS)
def test_the_comparison_detects_what_the_teacher_sees(path, plain, tmp_path):
    """The tests above depend on this: a label does reach the models, and only a label."""
    rows = [
        row | {"diagnostic_type": DiagnosticType.CASE_ANALYSIS}
        for row in tables().annotations.to_pylist()
    ]
    labelled = PATHS[path](tables().annotated(rows), tmp_path)
    assert labelled != plain[path]
    tokenizer = load_tokenizer(resolve_policy("micro"))
    assert any("hint: case_analysis" in tokenizer.decode(ids) for ids in labelled)
    assert not any(SECRET in tokenizer.decode(ids) for ids in labelled)


@pytest.mark.parametrize("path", PATHS)
def test_the_name_of_a_mistake_reaches_the_teacher_and_nothing_else_does(path, plain, tmp_path):
    planted = tables().planted("raw answer", "error", "reflection", "span text")
    planted = planted.rewarded(*REWARD_PLANTS).with_metadata()
    rows = [
        row if row["correct"] else row | {"diagnostic_type": ErrorType.OMITTED_CASE}
        for row in planted.annotations.to_pylist()
    ]
    named = PATHS[path](planted.annotated(rows), tmp_path)
    tokenizer = load_tokenizer(resolve_policy("micro"))
    texts = [tokenizer.decode(ids) for ids in named]
    assert any("hint: omitted_case" in text for text in texts)
    assert not any(SECRET in text for text in texts)
    assert len(named) == len(plain[path])


@pytest.mark.parametrize("label", TYPE_LABELS)
def test_the_words_of_a_label_are_all_that_a_diagnosis_adds(label):
    template = PromptConfig(student="{problem}", teacher="{problem} ({diagnosis})")
    (message,) = prompt.teacher_messages(template, "1+2", label)
    assert message["content"] == f"1+2 ({WORDS[label]})"
    assert prompt.teacher_messages(template, "1+2", label.value) == [message]


# --- what a teacher may see, by context ---


@cache
def four_rollouts() -> tuple[pa.Table, pa.Table, pa.Table]:
    """The rollouts, their verdicts and annotations, each twice: a peer of either kind for all.

    All annotations have a reflection.
    """
    known = tables()
    twice = []
    for table in (known.rollouts, known.verdicts, known.annotations):
        rows = table.to_pylist()
        more = [row | {"rollout_id": row["rollout_id"] + "b"} for row in rows]
        if "spans" in table.column_names:
            rows, more = ([r | {"reflection": "1+1"} for r in one] for one in (rows, more))
        if "sample_index" in table.column_names:
            more = [row | {"sample_index": row["sample_index"] + 2} for row in more]
        twice.append([*rows, *more])
    contracts = (ROLLOUTS, VERDICTS, ANNOTATIONS)
    rollouts, verdicts, annotations = (
        contract.table(rows) for contract, rows in zip(contracts, twice, strict=True)
    )
    return rollouts, verdicts, annotations


Replaced = Callable[[str, Row], Row]  # (table's name, row) -> changed fields


def texts_of(
    routing: RoutingConfig, replaced: Replaced = lambda name, row: {}
) -> tuple[list[str], list[str]]:
    """The prompts of all rows' teachers and of their contrasts, with fields of tables replaced."""
    rollouts, verdicts, annotations = four_rollouts()
    tables_of = {
        "problems": (PROBLEMS, tables().problems),
        "rollouts": (ROLLOUTS, rollouts),
        "verdicts": (VERDICTS, verdicts),
        "annotations": (ANNOTATIONS, annotations),
    }
    changed = [
        contract.table(row | replaced(name, row) for row in table.to_pylist())
        for name, (contract, table) in tables_of.items()
    ]
    tokenizer = load_tokenizer(resolve_policy("micro"))
    routed = routed_table(*changed, byte_table(tokenizer), routing)
    sequences = [s for s in training_sequences(routed, tokenizer, PROMPT) if s.teacher_prompt_ids]
    assert sequences
    contrasts = [ids for s in sequences for ids in s.contrast_prompt_ids]
    return (
        [tokenizer.decode(s.teacher_prompt_ids or []) for s in sequences],
        [tokenizer.decode(ids) for ids in contrasts],
    )


def plant(column: str) -> Replaced:
    """A secret in one column."""

    def replaced(name: str, row: Row) -> Row:
        return {column: SECRET} if column in row else {}

    return replaced


COLUMNS = ("answer", "solution", "reflection")
SHOWN = {
    "answer": "answer",
    "solution": "solution",
    "other_solution": "solution",
    "reflection": "reflection",
}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("context", list(TeacherContext))
def test_a_teacher_sees_a_text_only_if_its_context_names_it(context, column):
    planted, _ = texts_of(ROUTING.model_copy(update={"teacher_context": context}), plant(column))
    assert all((SECRET in text) == (SHOWN.get(context) == column) for text in planted)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("contrast", [c for c in TeacherContext if c != TeacherContext.TYPE])
def test_the_contrasts_text_reaches_the_contrast_alone(contrast, column):
    """The type's teacher sees none of it; the contrast sees what its own context names."""
    routing = RoutingConfig(key="reweight", error="reweight", contrast_context=contrast)
    own, others = texts_of(routing, plant(column))
    assert others
    assert not any(SECRET in text for text in own)
    assert all((SECRET in text) == (SHOWN.get(contrast) == column) for text in others)


@pytest.mark.parametrize("contrast", [None, TeacherContext.NONE, TeacherContext.SOLUTION])
def test_under_the_type_no_field_that_others_fill_changes_the_teachers_prompt(contrast):
    action = "fkl" if contrast is None else "reweight"
    routing = RoutingConfig(key=action, error=action, contrast_context=contrast)

    def replaced(name: str, row: Row) -> Row:
        plants = PLANTS.values() if name == "annotations" else ()
        found = {field: value for plant in plants for field, value in plant(row).items()}
        rewards = REWARD_PLANTS.values() if name == "verdicts" else ()
        found |= {field: value for plant in rewards for field, value in plant.items()}
        return found | (METADATA if name == "problems" else {})

    assert texts_of(routing, replaced) == texts_of(routing)


@pytest.mark.parametrize("context", list(TeacherContext))
def test_every_teacher_sees_the_turns_before_the_problem_and_no_more_of_the_problems_row(context):
    """The history is a part of the problem. The student reads it too."""
    routing = ROUTING.model_copy(update={"teacher_context": context})
    turns = [{"role": "user", "content": SECRET}, {"role": "assistant", "content": "1"}]

    def replaced(name: str, row: Row) -> Row:
        if name != "problems":
            return {}
        return {"history": turns, "subject": "314159", "level": "314159", "metadata": "{}"}

    plain, _ = texts_of(routing)
    asked, _ = texts_of(routing, replaced)
    before = f"<|user|>{SECRET}<|assistant|>1<|end|>"
    assert [text.replace(before, "", 1) for text in asked] == plain
    # Without a context it reads the student's prompt as it was sampled, which is given here.
    assert all(text.startswith(before) != (context == TeacherContext.NONE) for text in asked)


# --- no other path exists ---


def test_the_teachers_label_is_a_member_of_an_enumeration_by_type_and_by_check():
    hints = typing.get_type_hints(prompt.teacher_messages)
    assert list(inspect.signature(prompt.teacher_messages).parameters) == [
        "config",
        "problem",
        "diagnostic_type",
        "history",
    ]
    assert typing.get_args(hints["diagnostic_type"]) == (DiagnosticType, ErrorType)
    with pytest.raises(ValueError, match="is not a valid DiagnosticType"):
        prompt.teacher_messages(PROMPT, "1+2", typing.cast(DiagnosticType, SECRET))
    rows = [row | {"diagnostic_type": SECRET} for row in tables().annotations.to_pylist()]
    with pytest.raises(InputError, match="diagnostic_type is '27182818', not one of"):
        validate(ANNOTATIONS.table(rows), ANNOTATIONS)


def constants(file: Path) -> set[str]:
    """Every string literal in a file: columns are read by name."""
    return {
        node.value
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_the_trainers_room_names_no_column_that_annotators_fill_freely():
    others = {*PROBLEMS.schema.names, *ROLLOUTS.schema.names, *VERDICTS.schema.names}
    own = set(ANNOTATIONS.schema.names) - others
    of_spans, of_segments = (
        {field.name for field in ANNOTATIONS.schema.field(name).type.value_type}
        for name in ("spans", "segments")
    )
    free = (own | of_spans) - others - of_segments - {"segments", "spans", "diagnostic_type"}
    assert {"raw_answer", "error", "annotator_name", "prompt_version", "text"} <= free
    # A routed row has no column for them either.
    assert not free & set(ROUTED.schema.names)
    named = {
        (file.name, name)
        for file in (ROOT / "trace").glob("*.py")
        for name in constants(file) & free
    }
    # The context of that name, which is outside TRACE's boundary.
    assert named == {("routed.py", "reflection")}
    written = {field for plant in (*REWARD_PLANTS.values(), METADATA) for field in plant}
    assert written == {"feedback", "grades", "parts", "parsed_answer", "verifier", "metadata"}
    assert not written & set(ROUTED.schema.names)
    named = {
        (file.name, name)
        for file in (ROOT / "trace").glob("*.py")
        for name in constants(file) & written
    }
    assert named == {("model_folder.py", "metadata")}  # of a file of weights


def test_only_sequences_asks_for_a_teachers_prompt():
    """Evaluation, report and samplers build the student's prompt; study and probe measure labels,
    and exports state the teacher's prompt of a routed row.
    """
    builders = {"teacher_messages", "privileged_messages", "teacher_chat"}
    callers = {
        str(file.relative_to(ROOT))
        for room in ("schemas", "data", "trace", "pipelines")
        for file in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.Name) and node.id in builders)
        or (isinstance(node, ast.Attribute) and node.attr in builders)
    }
    assert callers == {
        "trace/prompt.py", "trace/sequences.py", "pipelines/study/mechanism.py",
        "pipelines/exports/source.py", "pipelines/probe/measure.py",
    }  # fmt: skip
