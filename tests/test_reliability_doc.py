"""docs/reliability.md names a test for each statement; these tests check that each name exists."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "reliability.md").read_text()


def test_every_test_that_the_document_names_exists():
    named = re.findall(r"`([\w/]+\.py): (\w+)`|`(test_\w+)`", TEXT)
    assert len(named) > 30
    file = ""
    for path, first, other in named:
        file = path or file
        tree = ast.parse((TESTS / file).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert (first or other) in functions, f"{file}: {first or other}"


def test_every_file_that_the_document_names_exists():
    for path in re.findall(r"`((?:\w+/)*\w+\.py|\w+/)[`:]", TEXT):
        assert (TESTS / path).exists() or (TESTS.parent / path).exists(), path
