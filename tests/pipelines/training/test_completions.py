"""Tables of completions: what a row holds, and which steps have one."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_opd.pipelines.models import MICRO
from trace_opd.pipelines.training.completions import (
    SeenTables,
    completion_rows,
    marked_response,
)
from trace_opd.schemas.labels import Route
from trace_opd.schemas.tables import ROUTED
from trace_opd.tests.schemas.test_tables import ROWS
from trace_opd.trace.align import ByteTable, byte_table
from trace_opd.trace.policy import load_tokenizer

TOKENIZER = load_tokenizer(str(MICRO))
BYTES = byte_table(TOKENIZER)
SINGLE = ByteTable(tuple(bytes([value]) for value in range(256)))  # a token per byte
FKL, GRPO, RKL = int(Route.FKL), int(Route.GRPO), int(Route.RKL)


def routed(text: str, marked: str, route: int = FKL) -> dict:
    """A routed row of a response in which one piece of text is routed."""
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    starts, ends = BYTES.char_ranges(ids)
    at = text.index(marked)
    inside = (starts >= at) & (ends <= at + len(marked))
    return ROWS["routed"] | {
        "token_ids": ids, "logprobs": [-0.5] * len(ids), "route": np.where(inside, route, 0),
        "span_id": np.where(inside, 0, -1), "coverage": float(inside.mean()),
    }  # fmt: skip


def test_a_routed_span_is_marked_with_its_route():
    row = routed("4+9=13 c1\n8+7=15 c1\n", "8+7=15 c1")
    text = marked_response(BYTES, row["token_ids"], row["route"])
    assert text == "4+9=13 c1\n⟦fkl 8+7=15 c1⟧\n"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.data())
def test_marks_lose_no_character_wherever_routes_change(text, data):
    """Also where a route changes within the bytes of a character."""
    ids = list(text.encode())
    route = data.draw(st.lists(st.sampled_from([GRPO, FKL, RKL]), min_size=len(ids),
                               max_size=len(ids)))  # fmt: skip
    assert "⟦" not in text
    marked = marked_response(SINGLE, ids, route)
    assert re.sub(r"⟦[a-z]+ ([^⟧]*)⟧", r"\1", marked, flags=re.S) == text


def test_a_row_has_the_texts_the_reward_the_type_and_the_routes():
    row = routed("1+1=2\nok\n", "1+1=2") | {
        "rollout_id": "r", "reward": 1.0, "advantage": 0.5, "correct": True,
        "diagnostic_type": "arithmetic",
    }  # fmt: skip
    (found,) = completion_rows(ROUTED.table([row]), BYTES)
    tokens = len(row["token_ids"])
    inside = int((row["route"] == FKL).sum())
    assert found == {
        "rollout_id": "r", "problem": row["problem"], "response": "⟦fkl 1+1=2⟧\nok\n",
        "reward": 1.0, "advantage": 0.5, "correct": True, "type": "arithmetic",
        "routes": f"grpo {tokens - inside}, fkl {inside}", "coverage": round(inside / tokens, 4),
    }  # fmt: skip


@pytest.mark.parametrize(("every", "due"), [(None, []), (1, [0, 1, 2, 3]), (2, [0, 2])])
def test_every_so_many_steps_have_a_table_of_their_first_responses(every, due):
    table = ROUTED.table([routed("1+1=2\n", "1+1=2") | {"rollout_id": f"r{i}"} for i in range(40)])
    seen = SeenTables(lambda step: table, None, every)
    found = []
    for step in range(4):
        assert seen(step) is table
        rows = seen.rows(TOKENIZER)
        found += [step] if rows else []
        assert len(rows) in (0, 16)
    assert found == due
