"""examples/notebook: the notebook runs in a real kernel, from problems to a trained policy."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

import trace_opd as to

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_notebook_goes_from_rollouts_to_a_trained_policy(tmp_path):
    notebook = jupytext.read(ROOT / "examples" / "notebook" / "walk.py")
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pages = [
        output.data["text/html"]
        for cell in cells for output in cell.outputs if "text/html" in output.get("data", {})
    ]  # fmt: skip
    assert sum('<div class="trace-opd">' in page for page in pages) == 2
    assert sum("made from" in page for page in pages) == 3
    store = to.Store(tmp_path / "runs" / "notebook")
    assert store.get("train").summary["steps"] == 12
    rates = [
        store.get("evaluations").summary["policies"][role]["avg@4"]["value"]
        for role in ("base", "trained")
    ]
    assert rates[1] > rates[0]
    nbformat.validate(notebook)
