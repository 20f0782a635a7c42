"""README, docs/ and the other documents: links lead somewhere, commands and files exist."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import typer
import yaml

from trace_opd.pipelines.cli.commands import app

ROOT = Path(__file__).parents[1]
TOP = ("README", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG")
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in TOP),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
COMMANDS = set(typer.main.get_command(app).commands)
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT))
)


def code(text: str) -> str:
    """Code blocks and inline code alone, a line each."""
    blocks = re.findall(r"^```.*?\n(.*?)^```|`([^`\n]+)`", text, re.M | re.S)
    return "\n".join(block or inline for block, inline in blocks)


def outside_code(text: str) -> str:
    """Prose and tables, without code blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(document: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in headings}


@each_document
def test_links_lead_to_files_and_headings(document):
    links = re.findall(r"\]\(([^)\s]+)\)", outside_code(document.read_text()))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_document
def test_named_commands_exist(document):
    text = code(document.read_text())
    named = set(re.findall(r"\btrace-opd ([a-z][a-z-]*)(?=\s|$)", text, re.M))
    assert named <= COMMANDS | {"deduplicate"}  # an example of CONTRIBUTING.md
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", text)) <= targets


@each_document
def test_named_files_exist(document):
    if document.name == "CHANGELOG.md":
        return  # names files that have moved
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir())
    for path in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", document.read_text()):
        assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), path


def test_the_command_page_is_what_the_command_line_says():
    spec = spec_from_file_location("commands_page", ROOT / ".ci" / "commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "commands.md").read_text()
    assert page == module.page(), "run `make docs`"
    assert set(re.findall(r"^## `trace-opd ([a-z-]+)`$", page, re.M)) == COMMANDS


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) < 1200


def test_the_citation_names_both_titles_of_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert cited["title"] == "STEPS: Selective On-Policy Self-Distillation for Reasoning"
    assert "TRACE: Distilling Where It Matters" in cited["notes"]
    assert [one["value"] for one in cited["identifiers"]] == ["arXiv:2605.10194"]
