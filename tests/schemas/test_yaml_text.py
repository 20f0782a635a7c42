"""YAML is read within limits: any text gives a value or one YAMLError, quickly."""

import os
from contextlib import suppress

import pytest
import yaml

from trace_opd.schemas.configs import RolloutConfig, TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config
from trace_opd.schemas.yaml_text import load_yaml

DOUBLED = "".join(
    f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9 if i else ['1'])}]\n" for i in range(12)
)
MERGED = "k0: &k0 {a0: 1, b0: 1}\n" + "".join(
    f"k{i}: &k{i} {{<<: [{', '.join([f'*k{i - 1}'] * 50)}], a{i}: 1}}\n" for i in range(1, 30)
)
WIDE = "a: &a {" + ", ".join(f"k{i}: 1" for i in range(5000)) + "}\nb: {<<: ["
WIDE += ", ".join(["*a"] * 5000) + "]}"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (DOUBLED, "holds more than 20,000 values"),
        (WIDE, "holds more than 20,000 values"),
        ("a: &a " + "x" * 100_000 + "\nb: [" + "*a, " * 5000 + "]", "more than 4,194,304"),
        ("[" * 100_000, "nested too deep"),
        ("{a: " * 100, "nested too deep"),
        ("- " * 100_000, "nested too deep"),
        ("? " * 100_000, "nested too deep"),
        ("\n".join(f"k{i}: 1" for i in range(20_000)), "holds more than 20,000 values"),
        ("a: 1" + ":1" * 300_000, "a number of 600,001 characters"),
        ("a: 0x" + "f" * 4000, "a number of 4,002 characters"),
        ("a: " + "9" * 50, "more than 64 bits"),
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' appears twice"),
        ("{x: {a: 1, a: 2}}", "key 'a' appears twice"),
        ("a: &a [*a]", "inside its own anchor"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: !!binary /w==", "type bytes"),
        ("a: !!omap [b: 1]", "type tuple"),
        ("? [a]\n: b", "unhashable"),
        ("a: 2001-99-99", "month must be in"),
        ("a: \x07", "special characters are not allowed"),
        ("a: *b", "undefined alias"),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_excess_is_refused(text, what):
    with pytest.raises(yaml.YAMLError) as refused:
        load_yaml(text)
    assert what in str(refused.value)


def test_merges_of_merges_end():
    """PyYAML's releases differ in whether they keep values that are merged twice."""
    with suppress(yaml.YAMLError):
        assert len(load_yaml(MERGED)["k29"]) == 31


def test_merge_keys_and_aliases_are_resolved_as_yaml_specifies():
    text = "a: &a {x: 1, y: [2]}\nb: {<<: *a, x: 3}\nc: [*a, *a]"
    loaded = load_yaml(text)
    assert loaded == yaml.safe_load(text)
    assert loaded["c"][0] is not loaded["c"][1]


@pytest.mark.parametrize(
    "kind", ["large", "zeros", "pipe", "folder", "device", "absent", "nul", "bytes"]
)
def test_a_config_that_is_no_small_text_file_is_refused(tmp_path, kind):
    path = str(tmp_path / "config.yaml")
    match kind:
        case "large":
            (tmp_path / "config.yaml").write_text("# \n" * 400_000)
        case "zeros":
            with open(path, "wb") as file:  # noqa: PTH123
                file.truncate(40 << 30)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path = str(tmp_path)
        case "device":
            path = "/dev/zero"
        case "nul":
            path += "\0"
        case "bytes":
            (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError) as refused:
        load_config(RolloutConfig, path)
    assert "\n" not in str(refused.value)


HOSTILE = [
    "", "=", "==", "=1", "a", "a.b", ".", ".=1", "a..b=1", "a.=1", "seed", "seed=", "seed=[",
    "seed=" + "9" * 10**5, "seed=.nan", "seed=.inf", "seed=1e999", "seed=-1", "seed=x", "seed=[1]",
    "seed=" + "x" * 10**6, "x" * 10**6 + "=1", ".".join(["a"] * 10**5) + "=1", "seed.a.b=1",
    "\x1b[31m=1", "seed=\x1b[31m\n\u202e", "s\ned=1", "sampling=" + "[" * 10**5, "sampling=&a [*a]",
    "sampling=1", "sampling={1: 2}", "sampling={null: 2}", "sampling.temperature=.nan",
    "sampling.temperature=.inf", "sampling.temperature=-1", "sampling.top_k=1:1:1:1:1",
    "policy.path=\0", "policy=null", "sampler=", "sampler.engine=\x00", "sampler.engine=[a]",
    "sampler={engine: {a: b}}", "sampler.engine=openai", "sampling=2001-01-01",
    "sampling=!!set {a}",
    "prompt.student={problem!r}", "prompt.student={problem:>999999999}", "prompt.student={0}",
    "prompt.examples=[{}]", "problems=[]", "problems={a: b}", "problems=true",
]  # fmt: skip


@pytest.mark.parametrize("override", HOSTILE, ids=lambda text: repr(text[:20]))
def test_a_hostile_override_is_one_short_sentence_or_a_value(override):
    try:
        loaded = load_config(RolloutConfig, None, [override])
    except InputError as refused:
        message = str(refused)
        assert len(message) < 1500
        assert "\n" not in message
    else:
        assert loaded.semantic()


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_no_number_of_a_config_is_infinite_or_nan(value):
    for field in ("learning_rate", "lr", "online.rollout.temperature", "weight_decay"):
        with pytest.raises(InputError):
            load_config(TrainConfig, None, [f"{field}={value}"])
