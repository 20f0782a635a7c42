"""README, docs/ and the other documents: links lead somewhere, commands and files exist."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import typer

from trace_opd.pipelines.cli.commands import app

ROOT = Path(__file__).parents[1]
TOP = ("README", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG")
DOCUMENTS = [*(ROOT / f"{name}.md" for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = set(typer.main.get_command(app).commands)
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT))
)


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
    text = document.read_text()
    named = set(re.findall(r"(?:^|[`\s(])trace-opd ([a-z][a-z-]*)(?=[\s`)]|$)", text, re.M))
    assert not named - COMMANDS - {"is", "and"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    made = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.M))
    assert not made - targets


@each_document
def test_named_source_files_exist(document):
    if document.name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        pytest.skip("names modules that moved, and files that a reader adds")
    folders = "schemas|data|trace|pipelines|tests|benchmarks|configs|studies|deploy|docs|requirements"
    named = re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", document.read_text())
    for path in named:
        assert (ROOT / path).exists(), path


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
