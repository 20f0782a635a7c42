"""What a policy's tokens are: the bytes of each, their fingerprint and their number.

Stage convert, the viewer and `trace-opd compare` call `load_vocabulary`. A tokenizer takes seconds
to load, and torch with it; what they need of one is kept in the machine's cache folder, under the
hash of the files that it is made from. This file imports neither.
"""

import io
import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..data.atomic import write_atomic
from ..data.store import content_hash
from ..schemas.environment import cache_folder
from ..schemas.errors import InputError
from .align import ByteTable, byte_table
from .identity import model_revision

logger = logging.getLogger(__name__)

_FORM = 1  # increased when other bytes are made of the same files
_ABOUT = b"vocabulary"


@dataclass(frozen=True)
class Vocabulary:
    """pieces: the bytes of each id; fingerprint: of the tokenizer's tokens and ids; size: number of
    the model's ids, padding included, None if its config.json does not say.
    """

    pieces: ByteTable
    fingerprint: str
    size: int | None


def load_vocabulary(path: str, trust_remote_code: bool = False) -> Vocabulary:
    """The vocabulary of the model in a folder.

    Raises:
        InputError: see `load_tokenizer` and `byte_table`.
    """
    if trust_remote_code:  # its code may depend on more than its files
        return _made(path, trust_remote_code)
    state = model_revision(path, weights=False)
    versions = [version("transformers"), version("tokenizers")]
    entry = cache_folder("vocabularies") / f"{content_hash([_FORM, *versions, state])}.arrow"
    if (kept := _kept(entry)) is not None:
        return kept
    made = _made(path, trust_remote_code)
    if model_revision(path, weights=False) == state:
        with suppress(OSError, InputError):  # without a cache it is made again
            write_atomic(entry, _encoded(made))
    return made


def _made(path: str, trust_remote_code: bool) -> Vocabulary:
    from .policy import load_tokenizer, vocab_fingerprint, vocab_size

    tokenizer = load_tokenizer(path, trust_remote_code)
    size = None
    with suppress(InputError):  # bytes can be painted without it
        size = vocab_size(path, trust_remote_code)
    return Vocabulary(byte_table(tokenizer), vocab_fingerprint(tokenizer), size)


def _encoded(vocabulary: Vocabulary) -> bytes:
    about: Any = {_ABOUT: json.dumps([vocabulary.fingerprint, vocabulary.size]).encode()}
    pieces = pa.array(vocabulary.pieces.pieces, pa.large_binary())
    table = pa.table({"piece": pieces}).replace_schema_metadata(about)
    content = io.BytesIO()
    with pa.ipc.new_file(content, table.schema) as file:
        file.write_table(table)
    return content.getvalue()


def _kept(entry: Path) -> Vocabulary | None:
    """The vocabulary in a cache entry; None if the entry is absent or damaged."""
    try:
        with pa.ipc.open_file(io.BytesIO(entry.read_bytes())) as file:
            table = file.read_all()
        table.validate(full=True)
        fingerprint, size = json.loads((table.schema.metadata or {})[_ABOUT])
        pieces: Any = table["piece"].to_pylist()
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        if not isinstance(error, FileNotFoundError):
            logger.info("%s is made again (%s)", entry, error)
        return None
    if table.schema.field("piece").type != pa.large_binary() or None in pieces:
        return None
    return Vocabulary(ByteTable(tuple(pieces)), fingerprint, size)
