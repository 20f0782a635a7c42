"""Errors with a vocabulary of their own, and corrective ideas, from each engine."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from trace_opd.data.sources.arithmetic import steps
from trace_opd.data.store import Store
from trace_opd.pipelines.annotators import open_annotator
from trace_opd.pipelines.annotators.answer_schema import MOST_REFLECTION_CHARS
from trace_opd.pipelines.annotators.answers import read_answer, states_answer
from trace_opd.pipelines.annotators.bounds import bounded_schema, most_bytes
from trace_opd.pipelines.annotators.dialogue import dialogue
from trace_opd.pipelines.annotators.prompting import (
    SHIPPED_PROMPT,
    SHIPPED_PROMPT_V2,
    SHIPPED_SCHEMA,
    ask,
    load_prompt,
)
from trace_opd.pipelines.annotators.rows import Item
from trace_opd.pipelines.compare.marks import TYPES
from trace_opd.pipelines.paid.questions import Answer
from trace_opd.pipelines.stages.annotate import STAGE as ANNOTATE_STAGE
from trace_opd.pipelines.stages.base import close_engine
from trace_opd.schemas.configs import (
    AnnotateConfig,
    AnnotatorPrompt,
    OpenAIAnnotator,
    OwnAnnotator,
    RuleAnnotator,
    SegmentConfig,
    SelfAnnotator,
)
from trace_opd.schemas.contract import validate
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import (
    TYPE_LABELS,
    WORDS,
    AnnotationStatus,
    DiagnosticType,
    ErrorType,
    FinishReason,
    SpanKind,
)
from trace_opd.schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.trace.protocols import Completion, PolicyInfo, Prompt
from trace_opd.trace.segment import segment

RESPONSE = "There are 3 boxes. Each holds 4 pens. So 3 + 4 = 7.\nThe answer is 7."
TYPED = load_prompt(error_types=True)
BOTH = load_prompt(error_types=True, reflection=True)
IDEA = "Multiply the number of boxes by what each holds."


def item(correct: bool = False, answer: str = "1200") -> Item:
    problem = {"problem": "3 boxes?", "answer": answer, "solution": None}
    return Item("r", "p", "g", problem, RESPONSE, segment(RESPONSE), correct)


def answer(type: str, *segments: list[int], **more: Any) -> str:
    spans = [{"segments": named, "quote": None} for named in segments or ([2],)]
    return json.dumps({"abstain": False, "spans": spans, "type": type} | more)


def made_tables(*responses: tuple[str, bool | None], steps_of: Any = None, answer: str = "12"):
    problem = {
        "problem_id": "p", "problem": "3 boxes of 4 pens?", "answer": answer, "answer_kind": "math",
        "solution": None, "steps": steps_of, "source": "test", "split": "train",
    }  # fmt: skip
    rollout = {
        "prompt_token_ids": [], "token_ids": [], "logprobs": [], "finish_reason": "stop",
        "policy_name": "test", "policy_revision": "0", "policy_step": 0, "vocab_fingerprint": "",
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 64, "on_policy": False,
    }  # fmt: skip
    verdict = {"parsed_answer": "7", "status": "ok", "verifier": "test", "seconds": 0.0}
    ids = [
        {"rollout_id": f"r{n}", "problem_id": "p", "group_id": "g"} for n in range(len(responses))
    ]
    return (
        PROBLEMS.table([problem]),
        ROLLOUTS.table(
            rollout | row | {"sample_index": n, "seed": n, "response": responses[n][0]}
            for n, row in enumerate(ids)
        ),
        VERDICTS.table(
            verdict | row | {"reward": None, "correct": responses[n][1]}
            for n, row in enumerate(ids)
        ),
    )  # fmt: skip


# --- the question and its answer ---


def test_by_default_the_question_is_the_one_of_older_datasets():
    plain = load_prompt()
    assert (plain.version, plain.error_types, plain.reflection) == ("annotate-v1", False, False)
    assert set(plain.sha256) == {"prompt", "answer_schema"}
    shipped = json.loads(SHIPPED_SCHEMA.read_text())
    assert plain.schemas == dict.fromkeys(SpanKind, shipped)
    for config in (
        RuleAnnotator(engine="rule"),
        SelfAnnotator(engine="self"),
        OpenAIAnnotator(engine="openai", model="m"),
    ):
        assert not {"error_types", "reflection"} & set(config.semantic())


def test_key_and_error_segments_are_asked_for_types_of_their_own_with_their_words():
    system, user = ask(TYPED, item())
    assert (TYPED.version, "words" in TYPED.sha256) == ("annotate-v2", True)
    key, _, error = system["content"].partition("The response is wrong, for its error segments:")
    assert all(f"- {label}: {WORDS[label]}\n" in key for label in DiagnosticType)
    assert all(f"- {label}: {WORDS[label]}\n" in error for label in ErrorType)
    assert not any(f"- {label}:" in error for label in DiagnosticType)
    assert "Mark its error segments" in user["content"]
    assert ask(TYPED, item(correct=True))[0] == system  # endpoints cache it


@pytest.mark.parametrize("correct", [True, False])
def test_a_label_of_the_other_kind_is_refused_and_corrected(correct: bool):
    own, other = (DiagnosticType.SETUP, ErrorType.OMITTED_CASE)[:: 1 if correct else -1]
    reading = read_answer(answer(own), TYPED, item(correct))
    assert (reading.status, reading.type) == (AnnotationStatus.OK, own)
    assert type(reading.type) is type(own)
    talk = dialogue(TYPED, item(correct), AnnotatorPrompt(error_types=True))
    first = next(talk)
    assert first.schema["properties"]["type"]["enum"] == [str(label) for label in type(own)]
    second = talk.send(Answer(answer(other)))
    assert f"type: '{other}' is not one of" in second.messages[3]["content"]
    with pytest.raises(StopIteration) as done:
        talk.send(Answer(answer(own)))
    assert done.value.value.type is own


@pytest.mark.parametrize("prompt", [SHIPPED_PROMPT, SHIPPED_PROMPT.with_name("first-error-v1.md")])
def test_an_older_prompt_file_lists_both_vocabularies(prompt: Path):
    system = ask(load_prompt(str(prompt), error_types=True), item())[0]["content"]
    assert all(f"- {label}: {WORDS[label]}" in system for label in TYPE_LABELS)


def own_schema(tmp_path: Path, labels: Sequence[str], **properties: Any) -> str:
    schema = json.loads(SHIPPED_SCHEMA.read_text())
    schema["properties"]["type"]["enum"] = list(labels)
    schema["properties"] |= properties
    path = tmp_path / "own.json"
    path.write_text(json.dumps(schema))
    return str(path)


def test_a_schema_of_ones_own_chooses_among_both_vocabularies(tmp_path: Path):
    path = own_schema(tmp_path, ["setup", "omitted_case", "miscount"])
    mine = load_prompt(None, path, error_types=True)
    assert mine.types[SpanKind.KEY] == (DiagnosticType.SETUP,)
    assert mine.types[SpanKind.ERROR] == (ErrorType.OMITTED_CASE, ErrorType.MISCOUNT)
    with pytest.raises(InputError, match=r"type omitted_case names a mistake; set annotator.error"):
        load_prompt(None, path)
    path = own_schema(tmp_path, ["setup", "counting"])
    with pytest.raises(InputError, match="has no label for error segments; add some of omitted"):
        load_prompt(None, path, error_types=True)
    path = own_schema(tmp_path, ["setup", "oops"])
    with pytest.raises(InputError, match="'oops' is no diagnostic type"):
        load_prompt(None, path, error_types=True)


# --- reflections ---


def test_a_corrective_idea_is_asked_for_where_it_is_wanted_and_only_there():
    asked, plain = (ask(one, item())[0]["content"] for one in (BOTH, TYPED))
    assert '"reflection": IDEA' in asked
    assert "Do not give the final answer" in asked
    assert "reflection" not in plain
    assert "{{" not in asked + plain
    assert "\n\n\n" not in asked + plain
    for kind, allowed in ((SpanKind.ERROR, ["string", "null"]), (SpanKind.KEY, "null")):
        assert BOTH.schemas[kind]["properties"]["reflection"] == {"type": allowed}
        assert BOTH.schemas[kind]["required"][-1] == "reflection"
    alone = load_prompt(reflection=True)
    assert (alone.version, "words" in alone.sha256) == ("annotate-v2", False)
    assert "- case_analysis" not in ask(alone, item())[0]["content"]
    assert alone.types[SpanKind.ERROR] == tuple(DiagnosticType)


@pytest.mark.parametrize(
    ("correct", "text", "reflection"),
    [
        (False, answer("omitted_case", reflection=f" {IDEA}\n"), IDEA),
        (False, answer("omitted_case", reflection="x" * MOST_REFLECTION_CHARS), "x" * 600),
        (True, answer("setup", reflection=None), None),
        (False, '{"abstain": true, "spans": [], "type": "miscount", "reflection": null}', None),
        (False, '{"abstain": false, "spans": [], "type": "miscount", "reflection": null}', None),
        (False, '{"abstain": false, "spans": [], "type": "miscount", "reflection": "a"}', "a"),
    ],
)
def test_a_wrong_response_gets_an_idea_and_a_right_one_gets_none(correct, text, reflection):
    reading = read_answer(text, BOTH, item(correct))
    assert reading.status != AnnotationStatus.INVALID, reading.error
    assert reading.reflection == reflection


@pytest.mark.parametrize(
    ("correct", "reflection", "why"),
    [
        (False, None, "reflection is empty, and spans are marked"),
        (False, " \n", "reflection is empty"),
        (False, "x" * (MOST_REFLECTION_CHARS + 1), "reflection is longer than 600 characters"),
        (False, "They are 1200, not 7.", "reflection states the final answer"),
        (False, 7, "reflection: 7 is not of type"),
        (True, IDEA, "reflection: .* is not of type 'null'"),
    ],
)
def test_an_idea_that_is_missing_too_long_or_gives_the_answer_is_refused(correct, reflection, why):
    label = "setup" if correct else "omitted_case"
    reading = read_answer(answer(label, reflection=reflection), BOTH, item(correct))
    assert (reading.status, reading.reflection) == (AnnotationStatus.INVALID, None)
    assert re.search(why, reading.error or "")


def test_an_answer_without_the_property_is_refused_and_unasked_ones_are_too():
    assert read_answer(answer("omitted_case"), BOTH, item()).status == AnnotationStatus.INVALID
    more = read_answer(answer("omitted_case", reflection="a"), TYPED, item())
    assert more.status == AnnotationStatus.INVALID


@pytest.mark.parametrize(
    ("text", "gold", "stated"),
    [
        ("It is 1200.", "1200", True),
        ("It is 1200, not 7.", "1200", True),
        ("There are 12000 or 1200.5 or 3,1200.", "1200", False),
        ("Write $x+1$.", "x+1", True),
        ("Add 12.", "12", False),  # too short to tell
        ("Nothing", "   ", False),
    ],
)
def test_the_gold_answer_is_found_as_a_word(text: str, gold: str, stated: bool):
    assert states_answer(text, gold) is stated


def test_a_prompt_and_a_schema_of_ones_own_must_ask_for_it(tmp_path: Path):
    with pytest.raises(InputError, match=r"annotate-v1.md: never asks for a reflection"):
        load_prompt(str(SHIPPED_PROMPT), reflection=True)
    path = own_schema(tmp_path, list(DiagnosticType))
    with pytest.raises(InputError, match="has no property reflection"):
        load_prompt(None, path, reflection=True)
    path = own_schema(tmp_path, list(DiagnosticType), reflection={"type": "string"})
    mine = load_prompt(None, path, reflection=True)
    assert mine.schemas[SpanKind.ERROR]["properties"]["reflection"] == {"type": "string"}
    assert mine.schemas[SpanKind.KEY]["properties"]["reflection"] == {"type": "null"}
    bad = tmp_path / "bad.md"
    text = SHIPPED_PROMPT_V2.read_text().replace("one or two sentences", "{{problem}}")
    bad.write_text(text)
    with pytest.raises(InputError, match="section reflection has a placeholder"):
        load_prompt(str(bad), reflection=True)


# --- constrained decoding ---


def test_a_structured_answer_has_labels_of_its_kind_and_a_bounded_idea():
    schema = bounded_schema(BOTH, 9, 2, 512)
    follows = Draft202012Validator(schema).is_valid
    assert follows(json.loads(answer("omitted_case", reflection=IDEA)))
    assert follows(json.loads(answer("omitted_case", reflection="A" * 240)))
    for bad in ("A" * 241, "", None, 'a "quote"', "back\\slash", "é", " starts with a space"):
        assert not follows(json.loads(answer("omitted_case", reflection=bad))), bad
    assert not follows(json.loads(answer("setup", reflection=IDEA)))
    assert most_bytes(schema, "answer") < 512
    longest = answer("wrong_unit_or_domain", [0, 1], [2, 3], reflection="A" * 240)
    assert most_bytes(schema, "answer") == len(longest)
    abstains = {"abstain": True, "spans": [], "type": "miscount"}
    assert follows(abstains | {"reflection": None})
    assert not follows(abstains | {"reflection": IDEA})
    right = Draft202012Validator(bounded_schema(BOTH, 9, 2, 512, SpanKind.KEY)).is_valid
    assert right(json.loads(answer("setup", reflection=None)))
    assert not right(json.loads(answer("setup", reflection=IDEA)))
    assert not right(json.loads(answer("omitted_case", reflection=None)))


class Sampler:
    """Answers rollouts marked wrong and right by a label of their kind, and keeps the schemas."""

    policy = PolicyInfo("answering", "rev", 7)

    def __init__(self) -> None:
        self.schemas: list[dict[str, Any]] = []

    def sample(self, prompts: Sequence[Prompt], sampling, seeds, schemas=None):
        self.schemas = list(schemas)
        wrong = ["answer is wrong" in prompt.messages[-1]["content"] for prompt in prompts]
        texts = [
            answer("miscount", [0], reflection=IDEA) if is_wrong else
            answer("counting", [0], reflection=None)
            for is_wrong in wrong
        ]  # fmt: skip
        return [[Completion(text, FinishReason.STOP, [1])] for text in texts]

    def close(self) -> None:
        raise AssertionError("the sampler belongs to the caller")


def test_the_policy_itself_is_asked_under_the_schema_of_each_kind():
    config = SelfAnnotator(engine="self", error_types=True, reflection=True)
    sampler = Sampler()
    annotator: Any = open_annotator(config, SegmentConfig(), sampler=sampler)
    table = annotator.annotate(*made_tables(("a\nb", True), ("a\nb", False), ("a", None)))
    rows = validate(table, ANNOTATIONS).to_pylist()
    assert [row["diagnostic_type"] for row in rows] == ["counting", "miscount", None]
    assert [row["reflection"] for row in rows] == [None, IDEA, None]
    kinds = (SpanKind.KEY, SpanKind.ERROR)
    assert sampler.schemas == [bounded_schema(BOTH, 2, 3, 512, kind) for kind in kinds]
    assert {row["prompt_version"] for row in rows} == {"annotate-v2"}


# --- an endpoint, one by one and in batches ---


def completion(content: str) -> tuple[int, dict[str, Any]]:
    choice = {"message": {"content": content}, "finish_reason": "stop"}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}


@pytest.mark.parametrize("batch", [False, True], ids=["one by one", "batch"])
def test_an_endpoint_gets_the_schema_of_the_kind_and_its_idea_is_journalled(
    tmp_path: Path, paid_server, make_verdicts, batch: bool
):
    bodies: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        bodies.append(body)
        first = len(body["messages"]) == 2
        return completion(answer("setup" if first else "wrong_setup", [1], reflection=IDEA))

    paid_server.answer = reply
    store: Store = make_verdicts(tmp_path, 1, 2)
    settings: dict[str, Any] = {"batch_poll_s": 0.01, "batch": batch}
    config = OpenAIAnnotator(
        engine="openai", base_url=paid_server.url, model="m", api_key_env=None, error_types=True,
        reflection=True, **settings,
    )  # fmt: skip
    dataset = ANNOTATE_STAGE.run(AnnotateConfig(annotator=config), store)
    close_engine()
    rows = dataset.read().to_pylist()
    assert [row["diagnostic_type"] for row in rows] == ["wrong_setup"] * 2
    assert [row["reflection"] for row in rows] == [IDEA] * 2
    assert (dataset.summary["types"], dataset.summary["reflections"]) == ({"wrong_setup": 2}, 2)
    assert len(bodies) == 4  # each label of the other kind was corrected once
    for body in bodies:
        schema = body["response_format"]["json_schema"]["schema"]
        assert schema == BOTH.schemas[SpanKind.ERROR]
    journal = "".join(file.read_text() for file in tmp_path.glob("annotate/*/journal/*"))
    assert IDEA in journal
    # Without the idea it is another question and another dataset.
    plain = config.model_copy(update={"reflection": False})
    draft: Any = ANNOTATE_STAGE.begin(AnnotateConfig(annotator=plain), store)[1]
    assert draft.id != dataset.id


# --- known steps ---

CARRIES = [
    {"text": one.text, "value": one.value, "type": one.type, "key": one.key}
    for one in steps(27, 15)  # 7+5+0=12 c1, 2+1+1=4 c0, \boxed{42}
]


def by_rule(
    response: str, correct: bool, known: Any = CARRIES, gold: str = "42", **config: Any
) -> dict[str, Any]:
    annotator = open_annotator(
        RuleAnnotator.model_validate({"engine": "rule"} | config), SegmentConfig()
    )
    made = annotator.annotate(*made_tables((response, correct), steps_of=known, answer=gold))
    (row,) = validate(made, ANNOTATIONS).to_pylist()
    return row


def test_the_rule_annotator_names_the_mistake_in_the_known_step():
    wrong = "7+5+0=12 c0\n2+1+0=3 c0\n\\boxed{32}"
    assert by_rule(wrong, False)["diagnostic_type"] == "case_analysis"
    row = by_rule(wrong, False, error_types=True)
    assert (row["diagnostic_type"], row["spans"][0]["segments"]) == ("omitted_case", [0])
    right = "7+5+0=12 c1\n2+1+1=4 c0\n\\boxed{42}"
    assert by_rule(right, True, error_types=True)["diagnostic_type"] == "case_analysis"
    slipped = by_rule(wrong, False, error_types=True, wrong_types=1.0)
    assert slipped["diagnostic_type"] in ("arithmetic_slip", "wrong_final_answer")


@pytest.mark.parametrize(
    ("response", "idea"),
    [
        ("7+5+0=12 c0\n2+1+0=3 c0\n\\boxed{32}", "work out this step: 7+5+0=12 c1"),
        ("7+5+0=12 c1\n2+1+0=3 c0\n\\boxed{32}", "work out this step: 2+1+1=4 c0"),
        (
            "7+5+0=12 c1\n2+1+1=4 c0\n\\boxed{24}",
            "check that the answer is what the steps give",
        ),
        ("7+5+0=12 c1", "work out this step: 2+1+1=4 c0"),
        (
            "7+5+0=12 c1\n2+1+1=4 c0\n\\boxed{42}\nso 7",
            "check that the answer is what the steps give",
        ),
    ],
)
def test_its_idea_is_the_first_known_step_that_is_not_there(response: str, idea: str):
    row = by_rule(response, False, reflection=True)
    assert row["reflection"] == idea
    assert "42" not in idea
    assert "reflection" not in by_rule(response, False)


def test_free_text_lacks_the_first_step_whose_value_is_never_stated():
    known = [
        {"text": "48/2=24", "value": "24", "type": "setup", "key": True},
        {"text": "48+24=72", "value": "72", "type": "arithmetic", "key": True},
    ]
    given: dict[str, Any] = {"known": known, "gold": "72", "match": "value", "reflection": True}
    row = by_rule("Half is 48/2=20. So 48+20=68.", False, **given)
    assert (row["status"], row["reflection"]) == ("ok", "work out this step: 48/2=24")
    row = by_rule("Half is 48/2=24. So 48-24=24.", False, **given)
    assert row["reflection"] == "check that the answer is what the steps give"
    assert by_rule("Half is 48/2=24. So 48+24=72.", True, **given)["reflection"] is None


# --- an annotator of one's own ---


@pytest.fixture
def own(tmp_path: Path, make_verdicts, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def annotate(reading: str, correct: bool = False, **config: Any) -> dict[str, Any]:
        (tmp_path / "own.py").write_text(
            "from trace_opd.pipelines.annotators.rows import Reading\n\n\n"
            f"class A:\n    def annotate(self, items):\n        return [Reading({reading})]\n"
        )
        annotator = open_annotator(OwnAnnotator(engine="own.py:A", **config), SegmentConfig())
        (row,) = validate(
            annotator.annotate(*made_tables(("a\nb", correct))), ANNOTATIONS
        ).to_pylist()
        return row

    return annotate


def test_an_annotator_of_ones_own_names_mistakes_and_reflects(own):
    assert own("'ok', [[0]], 'omitted_case'")["diagnostic_type"] == "omitted_case"
    assert own("'ok', [[0]], 'setup'")["diagnostic_type"] == "setup"
    row = own(f"'ok', [[0]], 'miscount', reflection={IDEA!r}", reflection=True)
    assert row["reflection"] == IDEA
    assert own("'empty'", reflection=True)["reflection"] is None


@pytest.mark.parametrize(
    ("reading", "correct", "config", "why"),
    [
        ("'ok', [[0]], 'omitted_case'", True, {}, "omitted_case names a mistake, and the response"),
        ("'empty', reflection='a'", False, {}, "set annotator.reflection=true"),
        ("'empty', reflection='a'", True, {"reflection": True}, "and the response is right"),
        ("'empty', reflection=3", False, {"reflection": True}, "reflection is 3, not a text"),
        ("'empty', reflection=' '", False, {"reflection": True}, "not a text of at most 600"),
        ("'empty', reflection='a' * 601", False, {"reflection": True}, "at most 600 characters"),
    ],
)
def test_what_it_returns_is_checked(own, reading, correct, config, why):
    with pytest.raises(InputError, match=why):
        own(reading, correct, **config)


# --- comparing ---


def test_a_comparison_knows_every_label():
    assert set(TYPES) == set(DiagnosticType) | set(ErrorType)
    assert len(TYPES) == len(set(map(str, TYPES)))
