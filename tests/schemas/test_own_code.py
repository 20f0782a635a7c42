"""Code of one's own: one loader for `file.py:name` and `module:name`, its faults as sentences."""

import os
import py_compile
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from trace_opd.schemas.configs import OwnSampler, RolloutConfig, VerifyConfig, located
from trace_opd.schemas.errors import InputError, OwnCodeError
from trace_opd.schemas.own_code import build, failure, load, running, short_name
from trace_opd.schemas.settings import load_config

OPTIONS = """
    from dataclasses import dataclass
    from pydantic import BaseModel, Field

    class Plain:
        def __init__(self, options): self.options = options

    class Without:
        pass

    class Data(Plain):
        @dataclass
        class Options:
            size: int
            name: str = "a"

    class Model(Plain):
        class Options(BaseModel):
            size: int = Field(ge=1)
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes own.py into the folder in which the test runs."""
    monkeypatch.chdir(tmp_path)
    others = [folder for folder in sys.path if not Path(folder, "own.py").exists()]
    monkeypatch.setattr(sys, "path", others)

    def write(text: str) -> Path:
        Path("own.py").write_text(dedent(text))
        return tmp_path / "own.py"

    yield write
    sys.modules.pop("own", None)


@pytest.mark.parametrize("name", ["own.py:f", "./own.py:f", "{folder}/own.py:f", "own:f"])
def test_a_file_or_a_module_is_loaded_and_again_only_if_it_has_changed(write, name):
    file = write("def f(): return 1")
    name = name.format(folder=file.parent)
    first = load(name, "x")
    assert (first.value(), first.file) == (1, file)
    assert load(name, "x").value is first.value
    write("def f(): return 2")  # of the same size, within the same second
    second = load(name, "x")
    assert second.value() == 2
    assert second.sha256 != first.sha256
    with pytest.raises(InputError, match=r"has changed since this run began"):
        load(name, "x", first.sha256)


def test_bytecode_of_an_earlier_process_is_not_taken_for_the_source(write):
    file = write("def f(): return 1")
    py_compile.compile(str(file))
    written = file.stat()
    write("def f(): return 2")
    os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
    assert load("own:f", "x").value() == 2


def test_a_file_may_import_its_neighbours_and_its_errors_name_its_own_line(write):
    write("from own_helper import fail\n\n\ndef f():\n    fail()\n")
    Path("own_helper.py").write_text("def fail():\n    {}['a key']\n")
    code = load("own.py:f", "sampler.engine")
    with pytest.raises(OwnCodeError) as error, running(code):
        code.value()
    assert str(error.value).startswith(
        "sampler.engine own.py:f: own.py, line 5, in f: KeyError: 'a key'; TRACE_OPD_LOG=DEBUG"
    )
    assert error.value.exit_code == 1
    with pytest.raises(InputError, match=r"^mine$"), running(code):
        raise InputError("mine")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("none.py:f", "", r"none\.py: No such file or directory; name a Python file"),
        ("..:f", "", r"module \.\. cannot be imported"),
        ("./:f", "", r"\./: Is a directory; name a Python file"),
        ("no_such:f", "", r"module no_such cannot be imported .*; run in its folder, add it"),
        ("own.py:", "", r"write file\.py:Class"),
        ("own.py:a-b", "", r"write file\.py:Class"),
        ("own.py:G", "class F: pass\nN = 1", r"own\.py has no class or function G; it has F$"),
        ("own.py:N", "N = 1", r"has no class or function N; it has none"),
        ("own.py:f", "a = 1\ndef f(:\n", r"cannot be imported \(own\.py, line 2: SyntaxError"),
        ("own.py:f", "\n1 / 0\n", r"\(own\.py, line 2, in <module>: ZeroDivisionError: division"),
        ("own:f", "\n1 / 0\n", r"\(own\.py, line 2, in <module>: ZeroDivisionError: division"),
        ("own.py:f", "raise SystemExit(3)", r"line 1, in <module>: SystemExit: 3"),
        ("own.py:f", "import no_such_package", r"line 1, in <module>: ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(write, name, text, sentence):
    write(text)
    with pytest.raises(InputError, match=sentence) as error:
        load(name, "sampler.engine")
    assert str(error.value).startswith(f"sampler.engine {name!r}: ")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_options_are_validated_by_the_class(write):
    write(OPTIONS)
    assert build(load("own.py:Plain", "x"), {"any": [1]}).options == {"any": [1]}
    assert build(load("own.py:Data", "x"), {"size": "3"}).options.size == 3
    assert build(load("own.py:Model", "x"), {"size": 3}).options.size == 3
    assert build(load("own.py:Without", "x"), {})


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("Without", {"size": 1}, r"takes no options; remove them"),
        ("Data", {"size": 1, "sise": 2}, r"options\.sise is unknown; did you mean size"),
        ("Model", {"colour": 1}, r"options\.colour is unknown; known: size"),
        ("Data", {}, r"options\.size: .*required"),
        ("Data", {"size": "big"}, r"options\.size: .*valid integer.*'big'"),
        ("Model", {"size": 0}, r"options\.size: .*greater than or equal to 1"),
    ],
)
def test_bad_options_are_one_sentence(write, name, options, sentence):
    write(OPTIONS)
    with pytest.raises(InputError, match=sentence) as error:
        build(load(f"own.py:{name}", "x"), options)
    assert str(error.value).startswith(f"x own.py:{name}: ")


def test_an_id_covers_the_source_and_the_options_and_no_path(write):
    file = write("class S: pass")

    def identity(*overrides: str) -> dict:
        return load_config(RolloutConfig, None, list(overrides)).semantic()["sampler"]

    first = identity("sampler.engine=own.py:S")
    assert first == identity(f"sampler.engine={file}:S")
    assert str(file.parent) not in str(first)
    assert first != identity("sampler.engine=own.py:S", "sampler.options={a: 1}")
    write("class S: x = 1")
    assert first != identity("sampler.engine=own.py:S")
    with pytest.raises(InputError, match=r"engine 'none\.py:S'"):
        identity("sampler.engine=none.py:S")


def test_the_default_reward_leaves_ids_as_they_were(write):
    assert "reward" not in VerifyConfig().semantic()
    write("def f(response): return 1")
    assert load_config(VerifyConfig, None, ["reward.engine=own.py:f"]).semantic()["reward"]


def test_a_located_config_works_in_another_folder(write, tmp_path, monkeypatch):
    file = write("class S: pass")
    config = located(load_config(RolloutConfig, None, ["sampler.engine=own.py:S"]))
    monkeypatch.chdir("/")
    assert isinstance(config.sampler, OwnSampler)
    assert config.sampler.load("engine").file == file
    assert located(config) == config
    assert short_name(config.sampler.engine) == "own:S"
    assert located(RolloutConfig()) == RolloutConfig()


def test_a_failure_without_a_line_of_the_file_is_its_type_and_message():
    assert failure(ValueError("two\nlines"), None) == "ValueError: two lines"
    assert failure(KeyboardInterrupt(), Path("a.py")) == "KeyboardInterrupt"
