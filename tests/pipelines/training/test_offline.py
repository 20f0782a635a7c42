"""The reader of offline training: every group once per epoch, in an order that the step decides."""

from collections import Counter
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.training.offline import OfflineReader
from trace_opd.schemas.configs import OfflineConfig, TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import ROUTED

# Groups of each part: 1 to 3 rows each, not all of them adjacent.
PARTS = [["a", "b", "a", "c", "c"], ["d"], ["e", "f", "g", "f", "g", "h", "h", "e"]]
EPOCH = 8


@pytest.fixture
def routed(tmp_path) -> Dataset:
    return written(tmp_path, PARTS)


def written(folder, parts: list[list[str]]) -> Dataset:
    draft = Store(folder).begin("convert", {}, {}, ROUTED)
    for index, groups in enumerate(parts):
        rows = (row(f"{index}.{at}", group) for at, group in enumerate(groups))
        draft.write_part(index, ROUTED.table(rows))
    return draft.finish(len(parts))


def row(rollout_id: str, group: str) -> dict:
    return {
        "rollout_id": rollout_id, "problem_id": group, "group_id": group, "problem": "p",
        "prompt_token_ids": [1], "token_ids": [2], "logprobs": [-1.0], "temperature": 1.0,
        "reward": 1.0, "advantage": 0.0, "correct": True, "truncated": False, "route": [0],
        "span_id": [-1], "coverage": 0.0, "dropped_tokens": 0, "policy_name": "p",
        "policy_revision": "r", "policy_step": 0, "vocab_fingerprint": "v",
    }  # fmt: skip


def reader(routed: Dataset, groups_per_step: int, seed: int = 0) -> OfflineReader:
    config = TrainConfig(groups_per_step=groups_per_step, seed=seed, offline=OfflineConfig(steps=1))
    return OfflineReader(routed, config, vocab_size=100)


def order(seed: int, epoch: int) -> list[str]:
    """Parts shuffled, then the groups of each part, numbered by first appearance."""
    rng = np.random.default_rng([seed, epoch])
    out = []
    for part in rng.permutation(len(PARTS)):
        groups = list(dict.fromkeys(PARTS[part]))
        out += [groups[at] for at in rng.permutation(len(groups))]
    return out


def groups_of(table) -> list[str]:
    return [group for group, _ in groupby(table["group_id"].to_pylist())]


@pytest.mark.parametrize("seed", [0, 7])
def test_groups_come_in_the_seeds_order_epoch_after_epoch(routed, seed):
    read = reader(routed, groups_per_step=1, seed=seed)
    steps = [set(groups_of(read(step))) for step in range(3 * EPOCH)]
    expected = [{group} for epoch in range(3) for group in order(seed, epoch)]
    assert steps == expected
    assert expected[:EPOCH] != expected[EPOCH : 2 * EPOCH]


def test_a_step_has_all_rows_of_its_groups_and_no_others(routed):
    read = reader(routed, groups_per_step=EPOCH // 2)
    everything = [f"{part}.{at}" for part, groups in enumerate(PARTS) for at in range(len(groups))]
    for epoch in range(3):
        first, second = (read(2 * epoch + half)["rollout_id"].to_pylist() for half in (0, 1))
        assert sorted(first + second) == everything


def test_a_resumed_run_reads_what_an_undisturbed_one_does(routed):
    read = reader(routed, groups_per_step=3)
    undisturbed = [read(step) for step in range(10)]
    for step in (9, 4, 0):
        assert reader(routed, groups_per_step=3)(step).equals(undisturbed[step])


@pytest.mark.parametrize("sizes", [[1], [2], [1, 2], [5], [0, 6, 1]])
def test_a_step_has_as_many_groups_as_it_should_also_across_epochs(tmp_path, sizes, caplog):
    parts = [[f"{part}.{group // 2}" for group in range(2 * n)] for part, n in enumerate(sizes)]
    routed, size = written(tmp_path, parts), sum(sizes)
    for per_step in range(1, size + 3):
        read, count, seen = reader(routed, per_step), min(per_step, size), Counter()
        for step in range(4 * size // count + 1):
            groups = Counter(read(step)["group_id"].to_pylist())
            assert len(groups) == count
            assert set(groups.values()) == {2}
            seen.update(groups.keys())
            # Each group is read once more before any is read again.
            counts = [seen[group] for part in parts for group in set(part)]
            assert max(counts) - min(counts) <= 1
        assert read(7).equals(reader(routed, per_step)(7))
        assert (f"groups_per_step is {per_step}," in caplog.text) == (per_step > size)


def dataset_of(folder, contract, *parts) -> Dataset:
    """A dataset with unchecked parts, like a foreign program's."""
    draft = Store(folder).begin("convert", {}, {}, contract)
    for index, part in enumerate(parts):
        sink = pa.BufferOutputStream()
        pq.write_table(part, sink)
        draft.files.write(f"{draft.ref}/part-{index:05d}.parquet", sink.getvalue().to_pybytes())
    return draft.finish(len(parts))


NEWER = ROUTED.schema.with_metadata(ROUTED.schema.metadata | {b"trace_opd.version": b"99"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": [100]}, "row 1: token_ids has a token id outside the policy's 0 … "),
        ({"prompt_token_ids": [10**6]}, "row 1: prompt_token_ids has a token id"),
        ({"token_ids": [-1]}, "row 1: token_ids has a number"),
        ({"logprobs": [float("nan")]}, "row 1: logprobs has a number"),
        ({"logprobs": [-1.0, -1.0]}, "row 1: logprobs has another length"),
        ({"route": [1]}, "row 1: diagnostic_type is null"),
        ({"route": [9]}, "row 1: route is not in 0"),
        ({"advantage": float("inf")}, "row 1: advantage has a number"),
    ],
)
def test_a_bad_row_of_any_part_is_one_sentence_before_the_first_step(tmp_path, change, message):
    good = ROUTED.table([row("0", "a")])
    bad = ROUTED.table([row("1", "b"), row("2", "c") | change])
    with pytest.raises(InputError, match=message):
        reader(dataset_of(tmp_path, ROUTED, good, bad), groups_per_step=1)


def test_parts_without_rows_and_of_another_version_are_one_sentence(tmp_path):
    empty = dataset_of(tmp_path / "empty", ROUTED, ROUTED.empty(), ROUTED.empty())
    with pytest.raises(InputError, match="has no rows"):
        reader(empty, groups_per_step=1)
    newer = ROUTED.table([row("0", "a")]).replace_schema_metadata(NEWER.metadata)
    routed = dataset_of(tmp_path / "newer", ROUTED, newer)
    for columns in (None, ["group_id"]):
        with pytest.raises(InputError, match="is version 99 of table routed"):
            routed.read_part(0, columns)


def test_a_negative_seed_is_refused_by_the_config():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        TrainConfig(seed=-1)
