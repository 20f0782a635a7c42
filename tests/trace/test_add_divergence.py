"""A divergence is a member of Route and an entry of DIVERGENCES, and nothing else.

The test adds one to a scratch copy of the package by two edits and uses it (added_divergence.py).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trace_opd.schemas.labels import Route
from trace_opd.trace.losses import DIVERGENCES

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("added_divergence.py")
EDITS = {
    "schemas/labels.py": ("    REWEIGHT = 4\n", "    REWEIGHT = 4\n    JEFFREYS = 5\n"),
    "trace/losses.py": (
        "DIVERGENCES = {\n",
        """def jeffreys(p, log_p, q, log_q, config):
    ratio = log_q - log_p
    return (q - p) * ratio, p - q - p * ratio


DIVERGENCES = {
    Route.JEFFREYS: jeffreys,
""",
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    package = tmp_path_factory.mktemp("scratch") / "trace_opd"
    for room in ("schemas", "data", "trace"):
        shutil.copytree(ROOT / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "__init__.py", package)
    for name, (old, new) in EDITS.items():
        file = package / name
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))
    done = subprocess.run(
        [sys.executable, "-P", str(PROGRAM), str(package / "data" / "micro")],
        env=os.environ | {"PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["package"] == str(package)
    return made


def test_a_config_names_it(found):
    assert found["route"] == 5
    assert "key: jeffreys" in found["yaml"]


def test_its_gradient_is_that_of_its_formula(found):
    assert found["gradients"]["fused"] == pytest.approx(found["gradients"]["formula"])
    assert any(found["gradients"]["formula"])


def test_a_step_measures_it(found):
    metrics = found["metrics"]
    assert metrics["coverage_jeffreys"] == pytest.approx(2 / 6)
    assert metrics["kl_jeffreys"] > 0
    assert metrics["coverage_fkl"] == 0
    assert "kl_fkl" not in metrics


def test_every_route_but_grpos_two_has_a_divergence():
    assert set(Route) - set(DIVERGENCES) == {Route.GRPO, Route.REWEIGHT}
