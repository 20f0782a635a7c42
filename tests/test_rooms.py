"""Import rules between the rooms, read from the source and tried without the optional packages."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("schemas", "data", "trace", "pipelines", "integrations")
FILES = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
FILES += sorted(ROOT.glob("*.py"))
# Which rooms a room may import; "trace_opd" alone is the root package.
OURS = {
    "schemas": {"schemas"},
    "data": {"schemas", "data"},
    "trace": {"schemas", "data", "trace"},
    "pipelines": {"schemas", "data", "trace", "pipelines"},
    "integrations": {"schemas", "data", "trace", "pipelines", "integrations"},
}
EXTRAS = (
    "prefect",
    "polars",
    "datasets",
    "openai",
    "math_verify",
    "typer",
    "jinja2",
    "tensorboard",
)
# Imported only to run on CUDA, where PyTorch brings Triton.
KERNELS = {"fused_kernels", "fused_triton"}
TRAINER_NEEDS = {"torch", "transformers", "safetensors", "pyarrow", "numpy"}


def imports(file: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, lazy imports included."""
    package = ["trace_opd", *file.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from .. import report` imports a module under the name that it binds.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    """The room of one of our modules; None for other packages."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == "trace_opd" else None


def files_of(room: str) -> list[Path]:
    return [file for file in FILES if file.is_relative_to(ROOT / room)]


def test_the_rules_see_relative_lazy_and_bare_imports():
    lazy = set(imports(ROOT / "pipelines" / "samplers" / "openai.py"))
    assert "trace_opd.schemas.configs.PolicyConfig" in lazy
    assert "trace_opd.pipelines.samplers.vllm_servers.VllmServersSampler" in lazy
    assert "trace_opd.pipelines.stages.base.Plan" in set(imports(ROOT / "flows.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_down(room):
    assert files_of(room)
    for file in files_of(room):
        ours = {room_of(module) for module in imports(file)} - {None}
        assert ours <= OURS[room], file


def test_the_modules_of_data_have_no_import_cycle():
    names = {
        ".".join(["trace_opd", *file.relative_to(ROOT).with_suffix("").parts]): file
        for file in files_of("data")
    }
    # `imports` yields what an import binds: a module, or a name in one.
    graph = {
        name: {module if module in names else module.rpartition(".")[0] for module in imports(file)}
        & set(names)
        for name, file in names.items()
    }
    assert "trace_opd.data.store_files" in graph["trace_opd.data.dataset"]
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_only_flows_imports_prefect():
    importers = {
        file.name
        for file in FILES
        if any(module.split(".")[0].startswith("prefect") for module in imports(file))
    }
    assert importers == {"flows.py"}


def test_nothing_imports_flows():
    for file in FILES:
        assert "flows" not in {room_of(module) for module in imports(file)}, file


def test_the_trainer_needs_torch_transformers_and_pyarrow_alone():
    for file in files_of("trace"):
        foreign = {module.split(".")[0] for module in imports(file)}
        own = {"trace_opd", "triton"} if file.stem in KERNELS else {"trace_opd"}
        assert foreign - set(sys.stdlib_module_names) - own <= TRAINER_NEEDS, file


def test_the_trainer_imports_where_the_extras_are_not_installed():
    program = f"""
import importlib, pkgutil, sys
for name in {EXTRAS!r}:
    sys.modules[name] = None  # for import and find_spec alike: not installed
import trace_opd.trace
modules = [m.name for m in pkgutil.walk_packages(trace_opd.trace.__path__, "trace_opd.trace.")
           if m.name.rpartition(".")[2] not in {KERNELS!r}]
for name in modules:
    importlib.import_module(name)
print(len(modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(files_of("trace")) - len(KERNELS) - 1  # __init__.py


def test_stages_that_run_no_model_start_without_torch():
    program = """
import sys
from trace_opd.pipelines import pipeline
from trace_opd.pipelines.cli import show
from trace_opd.pipelines.stages import REGISTRY
for name in ("problems", "verify", "select", "annotate", "report"):
    REGISTRY[name].load()
assert not {"torch", "transformers"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_wheel_holds_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {file.parent for room in ROOMS for file in (ROOT / room).rglob("__init__.py")}
    found = {"trace_opd", *(".".join(("trace_opd", *f.relative_to(ROOT).parts)) for f in folders)}
    assert set(settings["tool"]["setuptools"]["packages"]) == found
