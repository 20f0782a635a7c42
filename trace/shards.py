"""The tensors of a checkpoint: safetensors files by torch.distributed.checkpoint.

saved_run.py and export.py call it. Every rank writes the parts that it holds, and a file's header
says where each part lies in its tensor. So a run with another number of ranks, sharded or not,
reads what it needs. Nothing is pickled, so a foreign checkpoint runs no code.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

_FILE_BYTES = 1 << 30  # of each rank; the writer holds one file's tensors a second time

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Described:
    """A whole tensor's shape and type."""

    shape: torch.Size
    dtype: torch.dtype


def staged(tensors: Tensors) -> Tensors:
    """Copies on the CPU of what this rank holds; sharded tensors stay sharded."""
    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        copies = stager.stage(tensors)
    finally:
        stager.close()
    assert isinstance(copies, dict)
    return copies


def write_shards(
    tensors: Tensors, folder: Path, count: int, group: dist.ProcessGroup | None
) -> None:
    """Write this rank's parts of tensors on the CPU. Every rank of the group has to call.

    Tensors that are not sharded are the same on every rank; one of them writes it. count: of ranks.

    Raises:
        OSError, SafetensorError: on every rank if one of them cannot write.
    """
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_files(tensors, count), save_distributed=True
    )
    # The loader that overlaps copies would open a context on the first GPU in every rank.
    writer.per_thread_copy_ahead = 0
    _without_warning()
    try:
        save(tensors, storage_writer=writer, process_group=group, no_dist=count == 1)
    except CheckpointException as error:
        raise _cause(error) from None


def read_shards(tensors: Tensors, folder: Path) -> None:
    """Fill tensors, sharded or not, with what `write_shards` wrote under any number of ranks.

    No rank waits for another.

    Raises:
        OSError, SafetensorError, ValueError: a file is missing, damaged or of other tensors.
    """
    if not tensors:
        return
    _without_warning()
    try:
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        raise _cause(error) from None


def described(folder: Path) -> dict[str, Described]:
    """Shapes and types of all tensors in a folder, by name.

    Raises:
        OSError, SafetensorError, ValueError: no such folder, a damaged file, a part is missing.
    """
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    found = {}
    for name, one in metadata.state_dict_metadata.items():
        assert isinstance(one, TensorStorageMetadata), "the reader knows nothing else"
        if sum(math.prod(chunk.sizes) for chunk in one.chunks) != math.prod(one.size):
            raise ValueError(f"a part of {name} is missing")
        found[name] = Described(one.size, one.properties.dtype)
    return found


def in_files(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """The number, from 1, of the file of each tensor; a file has `limit` bytes, or one tensor."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for name, size in sizes.items():
        if filled and filled + size > limit:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    return numbers


def _files(tensors: Tensors, count: int) -> dict[str, int]:
    sizes = {name: tensors[name].numel() * tensors[name].element_size() for name in sorted(tensors)}
    return in_files(sizes, _FILE_BYTES * count)


def _cause(error: CheckpointException) -> BaseException:
    """The first rank's error in a failure that torch.distributed.checkpoint collected."""
    return min(error.failures.items())[1][0]


def _without_warning() -> None:
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def shards_of(folder: Path, index: int) -> list[str]:
    """Names of the files that a rank wrote."""
    return sorted(path.name for path in folder.glob(f"shard-{index + 1:05d}-*.safetensors"))
