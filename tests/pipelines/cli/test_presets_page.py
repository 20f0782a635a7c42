"""docs/presets.md shows the presets as they are."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from trace_opd.schemas.presets import PRESETS

ROOT = Path(__file__).parents[3]


def test_the_tables_of_the_page_are_the_presets():
    spec = spec_from_file_location("presets_page", ROOT / ".ci" / "presets.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "presets.md").read_text()
    assert text == module.page(text), "run `make docs`"
    for name in PRESETS:
        assert text.count(f"\n| `{name}` |") == 2, name
