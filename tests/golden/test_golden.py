"""A refactoring changes no dataset id, no row and no loss of the micro pipeline (record.py).

Run by `make test`, or in seconds by `python -m pytest tests/golden`.
"""

import json
from typing import Any

import pytest

from trace_opd.tests.golden.record import FILE, record


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Any]:
    return record(tmp_path_factory.mktemp("golden"))


def test_ids_and_rows_are_those_on_record(made):
    golden = json.loads(FILE.read_text())
    assert made.keys() == golden.keys()
    for role, expected in golden.items():
        exact = {key: value for key, value in expected.items() if key not in ("means", "steps")}
        assert {key: made[role][key] for key in exact} == exact, role
        for name, mean in expected.get("means", {}).items():
            assert made[role]["means"][name] == pytest.approx(mean, rel=1e-4, abs=1e-6), name


def test_ten_steps_have_the_losses_on_record(made):
    expected = json.loads(FILE.read_text())["train"]["steps"]
    steps = made["train"]["steps"]
    assert len(steps) == len(expected) == 10
    for step, golden in zip(steps, expected, strict=True):
        assert step == pytest.approx(golden, rel=1e-3, abs=1e-5)
