"""Hooks of the documentation site (mkdocs.yml, `make docs`): pages and links from outside docs/.

- README.md, ARCHITECTURE.md, CONTRIBUTING.md, CHANGELOG.md and the examples' READMEs become pages.
- Each package gets a page under api/ with the docstrings of all its modules, from the list of
  files, so that no module is missing.
- docs/python.md ends with the docstrings of the functions that it names.
- The notes in docs/decisions/ are listed in the navigation.
- Links are written for readers of the repository. A link to a file that is no page (a YAML file, a
  figure of a study) becomes a link to a copy of that file in the site.
"""

import os
import re
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOMS = ("schemas", "data", "trace", "pipelines", "integrations")
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    **{
        f"examples/{folder.name}/README.md": f"examples/{folder.name}.md"
        for folder in sorted((ROOT / "examples").iterdir())
    },
}
# Documented on that page; the reference of their modules has them too.
INTERFACE = ("run", "load", "show")
_LINKS = tempfile.TemporaryDirectory(prefix="trace-opd-site-")  # removed when mkdocs ends
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=[)#])")


def packages() -> dict[str, list[Path]]:
    """The modules of each package by its dotted name, in the order of the rooms."""
    found = {"trace_opd": [ROOT / "flows.py"]}
    for room in ROOMS:
        for folder in sorted({file.parent for file in (ROOT / room).rglob("*.py")}):
            name = ".".join(["trace_opd", *folder.relative_to(ROOT).parts])
            found[name] = sorted(folder.glob("*.py"))
    return found


def api_page(package: str, files: list[Path]) -> str:
    """Markdown from which mkdocstrings makes the reference of one package."""
    modules = [f"{package}.{file.stem}" for file in files if not file.stem.startswith("__")]
    blocks = [f"# {package}", f"::: {package}", *(f"::: {module}" for module in modules)]
    first = next((file for file in files if file.stem == "__init__"), None)
    named = first is not None and "__all__" in first.read_text()
    if named or package == "trace_opd":  # names of the modules that follow, or of other pages
        blocks[1] += "\n    options: {members: false}"
    return "\n\n".join(blocks) + "\n"


@event_priority(100)  # before mkdocstrings reads the paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    # The root is the package trace_opd. A folder of that name with links to the rooms is all that
    # griffe has to read: the root itself also holds tests, environments and stores.
    package = Path(_LINKS.name) / "trace_opd"
    package.mkdir(exist_ok=True)
    for name in ("__init__.py", "flows.py", *ROOMS):
        if not (package / name).exists():
            (package / name).symlink_to(ROOT / name)
    handlers = config.plugins["mkdocstrings"].config.handlers
    handlers["python"]["paths"] = [str(package.parent)]
    reference = [{name: f"api/{name}.md"} for name in packages()]
    decisions = sorted(f"decisions/{file.name}" for file in (ROOT / "docs/decisions").glob("*.md"))
    config.nav = [*(config.nav or []), {"Decisions": decisions}, {"API reference": reference}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for name, modules in packages().items():
        files.append(File.generated(config, f"api/{name}.md", content=api_page(name, modules)))
    for page in files.documentation_pages():
        for link in _LINK.findall(page.content_string):
            target = _target(page.src_uri, link)
            if target.is_file() and files.get_file_from_path(uri := _uri(target)) is None:
                files.append(File.generated(config, uri, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def rewritten(match: re.Match[str]) -> str:
        uri = _uri(_target(page.file.src_uri, match[1]))
        return os.path.relpath(uri, Path(page.file.src_uri).parent)

    if page.file.src_uri == "python.md":
        markdown += interface()
    return _LINK.sub(rewritten, markdown)


def interface() -> str:
    """The docstrings of the functions of docs/python.md, without anchors of their own."""
    options = "{skip_local_inventory: true, show_root_full_path: false, heading_level: 3}"
    blocks = [f"::: trace_opd.pipelines.api.{name}\n    options: {options}" for name in INTERFACE]
    return "\n\n".join(["\n## Reference", *blocks]) + "\n"


def _target(page: str, link: str) -> Path:
    """The file of the repository that a link on a page names."""
    sources = {uri: source for source, uri in PAGES.items()}
    source = sources.get(page, f"docs/{page}")
    return Path(os.path.normpath((ROOT / source).parent / link))


def _uri(target: Path) -> str:
    """Where a file of the repository lies in the site."""
    path = target.relative_to(ROOT).as_posix()
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"
