"""Responses that tell counts of characters apart, and what two people mark in them.

The tests against a real Label Studio and those of its recorded exports share them.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_opd.data.store import Dataset, Store
from trace_opd.schemas.configs import SegmentConfig
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.trace.segment import segment


@dataclass(frozen=True)
class Case:
    """A response, and the texts that a person marks in it, in the order of marking."""

    name: str
    response: str
    correct: bool
    marks: tuple[str, ...]
    type: str | None = None

    def spans(self) -> list[tuple[int, int]]:
        """First and last + 1 character of the segments of each mark, found character by
        character."""
        found = []
        for start, end in places(self):
            touched = [
                (first, last)
                for first, last in segment(self.response, SegmentConfig())
                if any(start <= i < end and self.response[i].strip() for i in range(first, last))
            ]
            found.append((touched[0][0], touched[-1][1]))
        return found


CASES = (
    Case("plain", "First we add.\nThen 2 + 2 = 5.\nSo it is 5.", False, ("2 + 2 = 5",),
         "arithmetic_slip"),
    Case("emoji", "A 👨‍🚒 drives 😀😀 trucks. Then 🎉 2 + 2 = 5 🎉 in all.\n"
         "So 🧮 it is 5. 🎉", False, ("it is 5", "2 + 2 = 5 🎉", "😀 trucks"), "miscount"),
    Case("combining", "Let x̂ = 2 and é = 1, नमस्ते. So x̂ + é = 3.\nThus ñ = 4.", True,
         ("x̂ + é = 3", "ñ = 4"), "algebra_manipulation"),
    Case("CR LF", "Line one.\r\nLine two is wrong.\r\n\r\nLine three.\rLast one.", False,
         ("Last one", "two is wrong"), "other_mistake"),
    Case("white space", "\n\n   \tStep 1:\tadd.\n\t\tStep 2: 3\t+ 4 = 8.\n  ", False,
         ("3\t+ 4 = 8", "Step 1:\tadd"), "arithmetic_slip"),
    Case("HTML", "If a<b & b>c then <b>bold</b> &amp; <script>alert(1)</script> runs.\nSo <br> it "
         "is \"5\" or '6'.", False, ("<b>bold</b> &amp; <script>", "\"5\" or '6'"),
         "invalid_inference"),
    Case("formula", "We have $\\frac{1}{2} \\ne 3$.\nSo \\[ 𝑥^2 + 𝒚 = 4 \\] holds.\n"
         "Thus \\boxed{4}.", True, ("𝑥^2 + 𝒚 = 4", "\\frac{1}{2} \\ne 3"), "substitution"),
    Case("controls", "A\x07B is.\nThen\x0c C\x7f is wrong.", False, ("C\x7f is wrong",), None),
    Case("several lines", "So a = 1.\nAnd b = 2.\nAnd c = 3.\nThus 𝒅 = 4.", False,
         ("= 2.\nAnd c", "𝒅 = 4"), "wrong_setup"),
)  # fmt: skip


def make_store(root: Path) -> Store:
    """A store with a verdicts dataset `verdicts` of the cases, one rollout each."""
    store = Store(root)
    problems, rollouts, verdicts = [], [], []
    for index, case in enumerate(CASES):
        ids = {"rollout_id": f"r{index}", "problem_id": f"p{index}", "group_id": f"p{index}"}
        problems.append(
            {"problem_id": f"p{index}", "problem": f"What is {case.name}? <i>&amp;</i> 🎉",
             "answer": "4", "answer_kind": "math", "solution": None if index else "2 + 2 = 4.",
             "steps": None, "source": "test", "split": "test"}
        )  # fmt: skip
        rollouts.append(
            ids
            | {"sample_index": 0, "prompt_token_ids": [], "token_ids": [], "logprobs": [],
               "response": case.response, "finish_reason": "stop", "policy_name": "test",
               "policy_revision": "", "policy_step": 0, "vocab_fingerprint": "", "temperature": 1.0,
               "top_p": 1.0, "top_k": 0, "max_new_tokens": 9, "seed": index, "on_policy": False}
        )  # fmt: skip
        verdicts.append(
            ids
            | {"reward": float(case.correct), "correct": case.correct, "parsed_answer": None,
               "status": "ok", "verifier": "test", "seconds": 0.0}
        )  # fmt: skip
    made = _dataset(store, "problems", PROBLEMS, problems, {})
    made = _dataset(store, "rollout", ROLLOUTS, rollouts, {"problems": made})
    made = _dataset(store, "verify", VERDICTS, verdicts, {"rollouts": made})
    store.set_alias("verdicts", made)
    return store


def _dataset(store: Store, stage: str, contract, rows: list[dict], inputs) -> Dataset:
    """Two parts, so that the order of parts matters."""
    draft = store.begin(stage, {"made": "for labels"}, inputs, contract)
    for part, chosen in enumerate((rows[:5], rows[5:])):
        draft.write_part(part, contract.table(chosen))
    return draft.finish(2)


def places(case: Case) -> list[tuple[int, int]]:
    """First and last + 1 character of each mark, by Python's own count: code points."""
    found = [case.response.rindex(text) for text in case.marks]
    return [(start, start + len(text)) for start, text in zip(found, case.marks, strict=True)]


def result(case: Case) -> list[dict[str, Any]]:
    """What a person answers about a case, as results of Label Studio."""
    xpath = {"start": "/span[1]/text()[1]", "startOffset": 0, "endOffset": 1}
    common = {"to_name": "response_html"}
    found: list[dict[str, Any]] = [
        common
        | {"id": f"m{index}", "from_name": "marks", "type": "labels",
           "value": xpath | {"end": xpath["start"], "labels": ["key" if case.correct else "error"],
                             "globalOffsets": {"start": start, "end": end}}}
        for index, (start, end) in enumerate(places(case))
    ]  # fmt: skip
    if case.type is not None:
        chosen = {"choices": [case.type]}
        found.append(common | {"id": "t", "from_name": "type", "type": "choices", "value": chosen})
    return found


def written(store: Store) -> list[dict[str, Any]]:
    """An export as another tool writes it: only what docs/labelling.md requires."""
    tasks = []
    for index, case in enumerate(CASES):
        entries: list[dict[str, Any]] = [
            {"from_name": "marks",
             "value": {"start": start, "end": end, "text": case.response[start:end],
                       "labels": ["key" if case.correct else "error"]}}
            for start, end in places(case)
        ]  # fmt: skip
        if case.type is not None:
            entries.append({"from_name": "type", "value": {"choices": [case.type]}})
        sha256 = hashlib.sha256(case.response.encode()).hexdigest()
        data = {"verdicts": store.get("verdicts").ref, "rollout_id": f"r{index}"}
        tasks.append(
            {
                "data": data | {"response_sha256": sha256},
                "annotations": [{"completed_by": "rule", "result": entries}],
            }
        )
    return tasks


def drawn(row: dict[str, Any]) -> list[tuple[int, int]]:
    """The offsets of a row's marks as they were drawn."""
    values = [entry.get("value", entry) for entry in _entries(json.loads(row["raw_answer"]))]
    offsets = [value.get("globalOffsets", value) for value in values if "labels" in value]
    return [(one["start"], one["end"]) for one in offsets]


def _entries(raw: Any) -> list[dict[str, Any]]:
    return raw.get("marks", []) if isinstance(raw, dict) else raw  # JSON-MIN, JSON


def check_marks(made: Dataset, rounded: bool = False) -> None:
    """The dataset holds what was marked: offsets, segments, order and type of each case.

    rounded: the marks were drawn around segments.
    """
    rows = made.read().to_pylist()
    assert [row["rollout_id"] for row in rows] == [f"r{index}" for index in range(len(CASES))]
    for row, case in zip(rows, CASES, strict=True):
        check_row(row, case, rounded)


def check_row(row: dict[str, Any], case: Case, rounded: bool = False) -> None:
    assert drawn(row) == (case.spans() if rounded else places(case)), case.name
    assert row["status"] == "ok", case.name
    assert row["diagnostic_type"] == case.type, case.name
    assert {span["kind"] for span in row["spans"]} == {"key" if case.correct else "error"}
    assert [(span["start"], span["end"]) for span in row["spans"]] == case.spans(), case.name
    assert all(span["text"] == case.response[span["start"] : span["end"]] for span in row["spans"])


def check_two_people(made: dict[str, Dataset]) -> None:
    """Anna marked everything, with an earlier answer each. Ben marked nothing in r0, skipped r1,
    left a draft about r2, and marked the rest."""
    assert list(made) == ["human-anna", "human-ben"]
    check_marks(made["human-anna"])
    assert made["human-anna"].summary["replaced"] == len(CASES)
    rows = made["human-ben"].read().to_pylist()
    assert rows[0]["status"] == "empty"
    assert [row["status"] for row in rows[1:3]] == ["skipped", "skipped"]
    for row, case in zip(rows[3:], CASES[3:], strict=True):
        check_row(row, case)
    assert {row["annotator_name"] for row in rows} == {"ben"}
