"""The fuzz targets: each reads one input and lets only documented errors through.

hypothesis (test_fuzz.py) and atheris (run.py) call the same functions. A target returns None for a
valid input and for a documented refusal (InputError); any other exception is a defect.
"""

import atexit
import json
import math
import shlex
import shutil
import tempfile
from collections import Counter
from contextlib import closing, suppress
from copy import copy
from functools import cache
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trace_opd.data.parquet_reader import read_batches, read_table
from trace_opd.data.row_files import BadRow
from trace_opd.data.sources import files
from trace_opd.data.step_labels import json_rows, prm800k, processbench
from trace_opd.data.store import MANIFEST, Dataset, Store
from trace_opd.pipelines.annotators.answers import read_answer
from trace_opd.pipelines.annotators.prompting import ask, load_prompt
from trace_opd.pipelines.annotators.rows import SKIPPED, Identity, Item, annotation_row
from trace_opd.pipelines.cli.check_store import check_store
from trace_opd.pipelines.cli.show import show_dataset
from trace_opd.pipelines.endpoint import NotACompletion
from trace_opd.pipelines.labelling.read_export import read_export
from trace_opd.pipelines.models import MICRO, resolve_policy
from trace_opd.pipelines.paid.completion import checked_body, is_answer, read_record
from trace_opd.pipelines.paid.journal import Journal
from trace_opd.pipelines.paid.journal_lines import Answered, read_lines
from trace_opd.pipelines.paid.prices import load_prices
from trace_opd.pipelines.paid.questions import usage as dialogue_usage
from trace_opd.pipelines.paid.spending import open_spending
from trace_opd.pipelines.samplers.reply import read_completion
from trace_opd.pipelines.terminal import Terminal
from trace_opd.pipelines.viewer import view
from trace_opd.schemas import configs
from trace_opd.schemas.columns import MOST_LOGPROB
from trace_opd.schemas.configs import Columns, FilesSource, OpenAIAnnotator, SegmentConfig
from trace_opd.schemas.contract import TableContract, validate
from trace_opd.schemas.conversation import fault_of
from trace_opd.schemas.errors import DamagedFile, InputError
from trace_opd.schemas.labels import AnnotationStatus
from trace_opd.schemas.settings import dump_config
from trace_opd.schemas.settings import load_config as load_settings
from trace_opd.schemas.tables import ANNOTATIONS
from trace_opd.schemas.yaml_text import load_yaml
from trace_opd.trace.align import ByteTable, byte_table
from trace_opd.trace.chat_template import render_template
from trace_opd.trace.checkpoint import save_checkpoint
from trace_opd.trace.identity import TRAINER_FILE
from trace_opd.trace.loading import load_config, load_tokenizer, model_on_meta
from trace_opd.trace.policy import load_policy
from trace_opd.trace.saved_run import read_run
from trace_opd.trace.segment import segment
from trace_opd.trace.trainer import Trainer

CONFIGS = (
    configs.PipelineConfig,
    configs.ProblemsConfig,
    configs.RolloutConfig,
    configs.VerifyConfig,
    configs.SelectConfig,
    configs.AnnotateConfig,
    configs.ConvertConfig,
    configs.ScoreConfig,
    configs.TrainConfig,
    configs.EvaluateConfig,
    configs.ReportConfig,
)
SECTIONS = (
    "problems", "rollout", "verify", "select", "annotate", "convert", "score", "train", "evaluate",
    "report",
)  # fmt: skip
_PAID = OpenAIAnnotator(
    engine="openai",
    model="m",
    usd_per_million_prompt_tokens=1.0,
    usd_per_million_completion_tokens=2.0,
    budget_usd=1.0,
)
TOKENIZERS = ("byte level", "byte fallback", "characters")


@cache
def _folder() -> Path:
    """A folder for the input files, in memory where the machine has /dev/shm."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - mkdtemp names it
    folder = Path(tempfile.mkdtemp(prefix="trace-opd-fuzz-", dir=place))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _file(name: str, content: bytes) -> str:
    path = _folder() / name
    path.write_bytes(content)
    return str(path)


# --- configs and the files that they name ---


def config(content: bytes, overrides: list[str], which: int) -> None:
    """A config is refused, or prints as a config that loads as itself."""
    which %= len(CONFIGS)
    kind, section = CONFIGS[which], SECTIONS[which - 1] if which else None
    path = _file("config.yaml", content)
    try:
        loaded = load_settings(kind, path, overrides, section)
    except InputError:
        return
    again = load_settings(kind, _file("again.yaml", dump_config(loaded).encode()), None)
    # Compared as text: a config may hold NaN, which is unequal to itself.
    assert dump_config(again) == dump_config(loaded)
    with suppress(InputError):  # it names code of one's own that is not there
        json.dumps(loaded.semantic())


def prompt(content: bytes, schema: bytes | None) -> None:
    """A prompt file and an answer schema are refused, or make a prompt for any rollout."""
    try:
        loaded = load_prompt(
            _file("prompt.md", content), None if schema is None else _file("schema.json", schema)
        )
    except InputError:
        return
    ask(loaded, _item("One. {{problem}} two.\n"))


def yaml_text(content: bytes) -> None:
    """A YAML text is refused, or is a tree of values that JSON can hold, except dates and keys."""
    try:
        loaded = load_yaml(content.decode("utf-8", "replace"))
    except yaml.YAMLError:
        return
    assert yaml.safe_load(yaml.safe_dump(loaded, allow_unicode=True)) == loaded or "nan" in repr(
        loaded
    )


def model_file(content: bytes) -> None:
    """Any content of a model folder's file loads, or is refused with the file's name.

    The first byte chooses the file.
    """
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    name = names[content[0] % len(names)] if content else names[0]
    folder = _folder() / "model"
    shutil.copytree(MICRO, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(content[1:])
    try:
        if name == "config.json":
            model_on_meta(load_config(str(folder)))
        else:
            load_tokenizer(str(folder))
    except InputError as error:
        _names(error, str(folder))
    finally:
        shutil.rmtree(folder)


def checkpoint_file(content: bytes) -> None:
    """Any content of a checkpoint's file is read, or refused with the checkpoint's name.

    The first byte chooses the file: the counters and random states, or the tensors.
    """
    trainer, saved = _saved_run()
    (shard,) = saved.glob("shards/*")
    file = shard if content[:1] and content[0] % 2 else saved / TRAINER_FILE
    before = file.read_bytes()
    file.write_bytes(content[1:])
    try:
        read_run(trainer, saved, 0)
    except InputError as error:
        _names(error, str(saved))
    finally:
        file.write_bytes(before)


@cache
def _saved_run() -> tuple[Trainer, Path]:
    policy = load_policy(str(MICRO), "cpu", trainable=True)
    offline, grpo = configs.OfflineConfig(steps=1), configs.ScheduleConfig(w0=0.0)
    trainer = Trainer(policy, configs.TrainConfig(offline=offline, schedule=grpo))
    return trainer, save_checkpoint(trainer, _folder())


def view_query(content: bytes) -> None:
    """A query of the viewer is refused, or its numbers are indices of an array."""
    try:
        parameters = view._parameters(content.decode("latin-1"))
        numbers = [view._whole_number(parameters, name, -1) for name in ("from", "count", "after")]
    except view.BadRequest:
        return
    np.array(numbers, np.int64)


def prices(content: bytes) -> None:
    with suppress(InputError):
        load_prices(_file("prices.yaml", content))


# --- text to segments to tokens ---


def segments(text: str, min_chars: int = 1, max_segments: int = 200) -> None:
    """Segments tile the text."""
    found = segment(text, SegmentConfig(min_chars=min_chars, max_segments=max_segments))
    assert "".join(text[start:end] for start, end in found) == text
    assert all(start < end for start, end in found)
    assert len(found) <= max_segments


def alignment(kind: str, ids: list[int], max_segments: int = 200) -> None:
    """Every token with bytes belongs to one segment of the tokens' text."""
    table = tokenizer_table(kind)
    text = table.text(ids)
    found = segment(text, SegmentConfig(max_segments=max_segments))
    assert "".join(text[start:end] for start, end in found) == text
    sizes = np.array([len(table.pieces[i]) if i < len(table.pieces) else 0 for i in ids], int)
    owner = table.token_segments(ids, found)
    assert len(owner) == len(ids)
    assert ((owner >= 0) == (sizes > 0)).all()
    assert (owner < max(len(found), 1)).all()
    held = owner[sizes > 0]
    assert (np.diff(held) >= 0).all()
    first, last = (np.asarray(edge) for edge in table.char_ranges(ids))
    starts, ends = (np.array([pair[side] for pair in found], int) for side in (0, 1))
    with_bytes = np.flatnonzero(sizes)
    # Each token shares a character with its segment, and together the tokens cover the text.
    assert (
        np.maximum(first[with_bytes], starts[held]) < np.minimum(last[with_bytes], ends[held])
    ).all()
    covered = np.zeros(len(text), dtype=bool)
    for token in with_bytes:
        covered[first[token] : last[token]] = True
    assert covered.all()


def encoding(kind: str, text: str) -> None:
    """The tokens of a text decode to the text, and they align with its segments."""
    tokenizer = _tokenizer(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if kind == "byte level":
        assert tokenizer_table(kind).text(ids) == text
    elif kind == "byte fallback":  # the text itself may hold the vocabulary's sign for a space
        assert tokenizer_table(kind).text(ids) == text.replace("▁", " ")
    alignment(kind, ids)


@cache
def tokenizer_table(kind: str) -> ByteTable:
    return byte_table(_tokenizer(kind))


@cache
def _tokenizer(kind: str) -> PreTrainedTokenizerBase:
    if kind == "characters":
        return load_tokenizer(resolve_policy("micro"))
    if kind == "byte level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        samples = ["naïve café. 漢字とかな。 emoji 😀👍🏽 \\frac{1}{2} $x$. So\n\nthen  1.5! "] * 4
        tokenizer.train_from_iterator(samples, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,:!é漢", "▁a", "in", ".▁"]
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", *bytes_, *letters])}
    merges = [("▁", "a"), ("i", "n"), (".", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def template(content: bytes) -> None:
    """A chat template renders text, or is refused in one line."""
    tokenizer = copy(_tokenizer("characters"))
    tokenizer.chat_template = content.decode("utf-8", "replace")
    try:
        text = render_template(tokenizer, [{"role": "user", "content": "1+1?"}], {})
    except InputError as error:
        _names(error, "its chat template")
        return
    assert len(text) < 1 << 21


# --- annotators' answers ---


@cache
def _shipped_prompt():
    return load_prompt()


def _item(response: str, correct: bool = False) -> Item:
    problem = {"problem": "3 boxes of 4?", "answer": "12", "solution": None}
    return Item("r", "p", "g", problem, response, segment(response), correct)


def answer(text: str, response: str = "One. Two.\nThree. Four.") -> None:
    """Any answer of an annotator becomes a row of the annotations table."""
    item = _item(response)
    reading = read_answer(text, _shipped_prompt(), item)
    assert (reading.error is not None) == (reading.status is AnnotationStatus.INVALID)
    named = [index for span in reading.marked for index in span]
    assert len(set(named)) == len(named)
    assert set(named) <= set(range(len(item.segments)))
    row = annotation_row(item, Identity("a", "m"), reading)
    validate(ANNOTATIONS.table([row]), ANNOTATIONS)


def journal(content: bytes) -> None:
    """Any journal file gives answers that become rows, and a sum of what was spent."""
    folder = _folder() / "journal"
    folder.mkdir(exist_ok=True)
    (folder / "1-a.jsonl").write_bytes(content)
    opened = Journal(folder, readable=is_answer)
    for _, _, line in read_lines(folder / "1-a.jsonl"):
        if isinstance(line, Answered) and (record := opened.get(line.key)) is not None:
            usage = dialogue_usage([read_record(record)] * 2, 0.0)
            row = annotation_row(_item("One."), Identity("a", "m"), SKIPPED, usage)
            validate(ANNOTATIONS.table([row]), ANNOTATIONS)
    with suppress(InputError), closing(open_spending(_PAID, folder)) as spending:
        assert spending.budget is not None
        assert spending.budget.spent_usd >= 0


def completion(content: bytes) -> None:
    """A response body is no completion, is refused, or is a completion that can be trained on."""
    with suppress(NotACompletion):
        checked_body(content)
    try:
        read = read_completion(content, "http://server/v1", max_new_tokens=8, vocab_size=50)
    except NotACompletion:
        return
    except InputError as error:
        _names(error, "http://server/v1")
        return
    read.text.encode()
    for ids in (read.token_ids or [], read.prompt_token_ids or []):
        assert all(type(token) is int and 0 <= token < 50 for token in ids)
    if read.logprobs is not None:
        assert len(read.logprobs) == len(read.token_ids or [])
        assert all(-math.inf < logprob <= MOST_LOGPROB for logprob in read.logprobs)


# --- tables and files of problems ---


def _names(error: InputError, file: str, lines: int | None = None) -> None:
    assert file in str(error), error
    assert lines is None or str(error).isprintable()


def parquet(content: bytes, contract: TableContract) -> None:
    """A part is refused, or is a table of its contract."""
    store = Store(_folder() / "store")
    store.files.write("stage/id/part-00000.parquet", content)
    manifest = {"table": contract.name, "parts": [{"rows": 0}], "inputs": {}, "summary": {}}
    try:
        table = Dataset(store.files, "stage", "id", manifest).read_part(0)
    except InputError as error:
        _names(error, "part-00000.parquet")
        return
    assert table.schema.equals(contract.schema_of(table.column_names))
    table.validate(full=True)
    table.to_pylist()


STORED = {stage: f"{stage}/0123456789abcdef" for stage in ("problems", "train", "evaluate")}


def manifest(content: bytes) -> None:
    """A manifest is refused in a sentence, or everything that shows it works; no text in it becomes
    a shell command or a line of its own.
    """
    store = Store(_folder() / "foreign")
    for ref in STORED.values():
        store.files.write(f"{ref}/{MANIFEST}", content)
        try:
            dataset = store.get(ref)
        except DamagedFile as error:
            _names(error, MANIFEST, lines=1)
            continue
        dataset.lineage()
        with suppress(InputError):
            show_dataset(dataset, Terminal(file=StringIO()))
    _verified(store)


def aliases(content: bytes) -> None:
    """Aliases are refused in a sentence, or each has the form that this package writes."""
    store = Store(_folder() / "named")
    store.files.write("aliases.json", content)
    try:
        found = store.aliases()
    except DamagedFile as error:
        _names(error, "aliases.json", lines=1)
        found = {}
    assert all(name.isascii() and name.isprintable() for pair in found.items() for name in pair)
    _verified(store)


def _verified(store: Store) -> None:
    found = check_store(store).report()
    for line in found.renderables:
        if isinstance(line, Text):
            assert line.plain.isprintable()
            if line.plain.startswith("rm -r "):
                for path in shlex.split(line.plain.split(" && ")[0])[2:]:
                    # A dataset's folder or a file in it, never the store itself or a path outside
                    # it.
                    assert len(Path(path).relative_to(store.files.base).parts) >= 2
                    assert ".." not in path
    Terminal(file=StringIO()).print(found)


def table(made: pa.Table, contract: TableContract) -> None:
    """A table that a foreign program made is read back from a file."""
    sink = BytesIO()
    try:
        pq.write_table(made, sink)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):  # no such type in Parquet
        return
    parquet(sink.getvalue(), contract)


def foreign_parquet(content: bytes) -> None:
    """Any Parquet file is refused, or read as pyarrow reads it, with text of bounded length."""
    for read in (read_table, lambda *args: list(read_batches(*args, ["problem", "answer"]))):
        try:
            made = read(BytesIO(content), "x.parquet")
        except InputError as error:
            _names(error, "x.parquet")
            continue
        repr(made)


# Suffixes by the first byte of a seed.
PROBLEMS_FILES = {
    **{b"J": ".jsonl", b"P": ".parquet", b"A": ".json", b"C": ".csv", b"Z": ".jsonl.gz"},
    b"M": ".messages.jsonl",
}


def problems_file(content: bytes, suffix: str) -> None:
    """A file of problems is refused, or its rows are problems with text in them."""
    columns = Columns(messages="messages" if suffix == PROBLEMS_FILES[b"M"] else None)
    path = _file(f"problems{suffix}", content)
    source = FilesSource(kind="files", path=path, columns=columns)
    try:
        for row in files.rows(source, 0):
            if isinstance(row, BadRow):
                _names(row, f"problems{suffix}")
                continue
            assert row["problem"]
            assert row["answer"]
            pa.array([row["problem"], row["answer"], row["solution"]], pa.string())
            roles = [turn["role"] for turn in row.get("history") or ()]
            assert fault_of([*roles, "user"]) is None
            pa.array([turn["content"] for turn in row.get("history") or ()], pa.string())
    except InputError as error:
        _names(error, f"problems{suffix}")


def labelled_file(content: bytes) -> None:
    path = _file("labels.json", content)
    for read in (
        json_rows,
        processbench.labelled_responses,
        lambda path: prm800k.labelled_responses(path, Counter()),
        read_export,
    ):
        with suppress(InputError):
            for row in read(path):
                repr(row)
