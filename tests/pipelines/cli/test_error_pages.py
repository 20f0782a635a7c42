"""The pages that errors name: they exist, and the errors that name them are raised for real."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from trace_opd.pipelines.cli import main
from trace_opd.pipelines.cli.error_pages import OF_CLASS, OF_MODULE, page_of, with_page
from trace_opd.schemas.errors import Collapsed, InputError, OwnCodeError

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs" / "micro.yaml")
PAGES = sorted({*OF_CLASS.values(), *OF_MODULE.values()})


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site give a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", one.lower()).strip().replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_page_and_heading_exists(page):
    name, _, heading = page.partition("#")
    assert (ROOT / name).is_file()
    assert not heading or heading in anchors(ROOT / name)


@pytest.mark.parametrize("module", OF_MODULE)
def test_every_module_exists_and_raises_errors(module):
    spec = find_spec(f"trace_opd.{module}")
    assert spec is not None
    assert spec.origin is not None
    origin = Path(spec.origin)
    files = origin.parent.rglob("*.py") if origin.name == "__init__.py" else [origin]
    assert any("raise InputError" in file.read_text() for file in files), module


def test_an_error_of_another_module_has_no_page():
    with pytest.raises(InputError) as raised:
        raise InputError("x: is bad; mend it")
    assert page_of(raised.value) is None
    assert with_page(raised.value) == "x: is bad; mend it"


def test_the_class_counts_before_the_module():
    assert with_page(Collapsed("fell")) == f"fell; see {OF_CLASS[Collapsed]}"
    assert page_of(OwnCodeError("x")) == OF_CLASS[OwnCodeError]


@pytest.mark.parametrize(
    ("words", "page"),
    [
        (
            ["annotate", CONFIG, "annotator={engine: openai, model: m, api_key_env: NO_KEY}"],
            "docs/annotating.md#keys",
        ),
        (["problems", "source={kind: files, path: p.jsonl}"], "docs/your-own.md#columns"),
        (["rm", "rollouts"], "docs/quickstart.md#remove-what-is-not-needed"),
        (["ls", "nothing"], None),
    ],
)
def test_the_command_line_names_the_page(words, page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"text": "1+1"}\n')
    store = ["--store", str(tmp_path / "store")]
    for command in (
        ["problems", CONFIG, "limit=2"],
        ["rollout", CONFIG, "group_size=2"],
        ["verify", CONFIG],
        words,
    ):
        monkeypatch.setattr(sys, "argv", ["trace-opd", *command, *store])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert sentence.endswith(f"; see {page}\n") if page else "docs/" not in sentence
