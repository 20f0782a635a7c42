"""Comments, docstrings and documents use plain words: the phrases of a short list have better ones.

    python -m pytest tests/test_words.py

The list holds only phrases without a fair use ("the whole sequence" is fine, "whole or not at all"
is not). String literals are not searched. A folder that keeps the rule is named in ROOMS.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [
    ".ci",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "benchmarks",
    "data",
    "docs",
    "flows.py",
    "integrations",
    "pipelines",
    "schemas",
    "tests/cluster",
    "tests/data",
    "tests/fuzz",
    "tests/golden",
    "tests/integrations",
    "tests/kill",
    "tests/label_studio",
    "tests/pipelines",
    "tests/schemas",
    "tests/soak",
    "tests/trace",
    "tests/vllm",
    "trace",
]
PHRASES = {
    r"(?:is|are|was|were|be|been) told": "is reported, is logged, receives or sees",
    r"told (?:apart|off|in a sentence)": "differs, is refused, is one sentence",
    r"nobody (?:tells|watches)": "unknown, or the setting that is off",
    r"(?:what|who) (?:was|is|were) said": "the output, the message or the reply",
    r"(?:it|he|she|they|that|which|server|process|one) said": "printed, answered or reported",
    r"what (?:came|comes of)": "the answer, the request or the result",
    r"(?:on|along) the way": "in flight, in transit or meanwhile",
    r"whoever|whomever": "the user, the caller or the process",
    r"whole or not at all": "atomic",
    r"beside": "next to, with, in addition to or compared with",
    r"(?:each|every|first|last|another) look": "evaluation, validation or poll",
    r"(?:is|are|was|were|be) looked at": "is read, is polled or is checked",
    r"for ever": "forever",
    r"Of an? \w+ that": "put the subject first",
}


def prose(file: Path) -> list[str]:
    """A file's lines, stripped; of a Python file only its comments and docstrings."""
    text = file.read_text()
    if file.suffix == ".md":
        return [line.strip() for line in text.splitlines()]
    lines = [""] * (text.count("\n") + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = token.string.lstrip("# ").rstrip()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            first = node.lineno - 1
            for at, line in enumerate(str(node.value.value).splitlines()):
                lines[first + at] = line.strip()
    return lines


def findings(file: Path) -> list[str]:
    """Each phrase of the list in a file, also over the end of a line, with the words to use."""
    text = "\n".join(prose(file))
    found = []
    for phrase, instead in PHRASES.items():
        pattern = phrase.replace(" ", "[ \n]")
        for match in re.finditer(rf"\b(?:{pattern})\b", text):
            words = match[0].replace("\n", " ")
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{file.name}, line {line}: “{words}”; use {instead}")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_uses_plain_words(room):
    path = ROOT / room
    files = [file for suffix in ("py", "md") for file in path.rglob(f"*.{suffix}")]
    files = files or [path]
    assert not [line for file in sorted(files) for line in findings(file)]


def test_comments_docstrings_and_documents_are_searched_and_literals_are_not(tmp_path):
    python = tmp_path / "a.py"
    python.write_text(
        '"""Answers that are\n    told."""\n\n\ndef f():\n    """Stays for ever."""\n'
        '    return "for ever"  # whoever\n'
    )
    assert [line.split(";")[0] for line in findings(python)] == [
        "a.py, line 1: “are told”",
        "a.py, line 7: “whoever”",
        "a.py, line 6: “for ever”",
    ]
    document = tmp_path / "a.md"
    document.write_text("Lost on\nthe way. The whole sequence is routed, and `tell` is a name.\n")
    assert [line.split(";")[0] for line in findings(document)] == ["a.md, line 1: “on the way”"]
