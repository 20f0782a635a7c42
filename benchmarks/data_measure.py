"""One measurement on a store that data_case.py made; data.py runs each in its own process.

    python benchmarks/data_measure.py IMPLEMENTATION STORE

Prints {"rows", "tokens", "seconds", "cpu_seconds", "peak_rss_mib"} as JSON. The process is pinned
to one core. Seconds exclude its imports; the resident set includes them.

- convert: the stage as users run it, from datasets on disk to the finished dataset.
- reader: `OfflineReader` on convert's dataset, an epoch of shuffled steps of 16 groups;
  "start_seconds" is the time before the first step.
- parquet: pyarrow decodes the same files one after another and does nothing else.
- datasets_map: `datasets.map(batched=True)` over responses and spans: the fast tokenizer encodes
  the text again with `return_offsets_mapping`, and tokens are routed by these offsets, in the
  spans' order up to the cap. Excludes loading of the tables, rewards and advantages.

All but `convert` need the dataset that `convert` made.
"""

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

POLICY, ALPHA = "smollm2", 0.25
GROUPS_PER_STEP = 16
FKL, RKL = 1, 2


class Clock:
    """Wall and CPU time since its creation."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "seconds": time.perf_counter() - self._began[0],
            "cpu_seconds": time.process_time() - self._began[1],
        }


def convert(root: str) -> dict[str, Any]:
    from trace_opd.data.store import Store
    from trace_opd.pipelines.pipeline import run_stage
    from trace_opd.schemas.configs import ConvertConfig, PolicyConfig, RoutingConfig

    store = Store(root)
    (annotations,) = store.datasets("annotate")
    config = ConvertConfig(
        annotations=annotations.ref,
        policy=PolicyConfig(path=POLICY),
        routing=RoutingConfig(alpha=ALPHA, error="rkl"),  # pyright: ignore
    )
    clock = Clock()
    routed = run_stage("convert", config, store)
    measured = clock.read()
    tokens = routed.summary["tokens"]  # pyright: ignore
    return {"rows": annotations.rows, "tokens": tokens} | measured


def reader(root: str) -> dict[str, Any]:
    import pyarrow.compute as pc

    from trace_opd.data.store import Store
    from trace_opd.pipelines.training.offline import OfflineReader
    from trace_opd.schemas.configs import OfflineConfig, TrainConfig

    store = Store(root)
    (routed,) = store.datasets("convert")
    (groups,) = store.datasets("problems")
    steps = groups.rows // GROUPS_PER_STEP
    config = TrainConfig(groups_per_step=GROUPS_PER_STEP, offline=OfflineConfig(steps=steps))
    clock = Clock()
    read = OfflineReader(routed, config, 1 << 20)
    start = clock.read()["seconds"]
    rows, tokens, clock = 0, 0, Clock()
    for step in range(steps):
        table = read(step)
        rows += len(table)
        tokens += pc.sum(pc.list_value_length(table["token_ids"])).as_py()
    return {"rows": rows, "tokens": tokens} | clock.read() | {"start_seconds": start}


def parquet(root: str) -> dict[str, Any]:
    import pyarrow.parquet as pq

    from trace_opd.data.store import Store

    (routed,) = Store(root).datasets("convert")
    clock = Clock()
    for part in routed.manifest["parts"]:
        pq.read_table(routed.path(part["name"]))
    measured = clock.read()
    tokens = routed.summary["tokens"]
    size = sum(part["bytes"] for part in routed.manifest["parts"])
    return {"rows": routed.rows, "tokens": tokens} | measured | {"file_mb": size / 1e6}


def datasets_map(root: str) -> dict[str, Any]:
    import datasets
    import numpy as np

    from trace_opd.data.store import Store
    from trace_opd.pipelines.models import resolve_policy
    from trace_opd.trace.policy import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(resolve_policy(POLICY))

    def load(stage: str, columns: list[str], cache: str) -> datasets.Dataset:
        (dataset,) = Store(root).datasets(stage)
        paths = [dataset.path(part["name"]) for part in dataset.manifest["parts"]]
        return datasets.Dataset.from_parquet(paths, columns=columns, cache_dir=cache)  # pyright: ignore

    def route(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(
            batch["response"], add_special_tokens=False, return_offsets_mapping=True
        )
        routes = []
        for offsets, spans, correct in zip(
            encoded["offset_mapping"], batch["spans"], batch["correct"], strict=True
        ):
            starts, ends = np.array(offsets).T
            tokens = np.zeros(len(starts), dtype=np.uint8)
            left = math.floor(ALPHA * len(starts))
            for span in spans:
                inside = np.flatnonzero((starts < span["end"]) & (ends > span["start"]))[:left]
                tokens[inside] = FKL if correct else RKL
                left -= len(inside)
            routes.append(tokens)
        return {"token_ids": encoded["input_ids"], "route": routes}

    with tempfile.TemporaryDirectory() as cache:
        table = datasets.concatenate_datasets(
            [
                load("rollout", ["rollout_id", "response"], cache),
                load("annotate", ["correct", "spans"], cache),
            ],
            axis=1,
        )
        clock = Clock()
        routed = table.map(
            route,
            batched=True,
            remove_columns=["response", "correct", "spans"],
            cache_file_name=str(Path(cache) / "routed.arrow"),
        )
        measured = clock.read()
        tokens = sum(map(len, routed["token_ids"]))
    return {"rows": len(routed), "tokens": tokens} | measured


IMPLEMENTATIONS = {
    "convert": convert,
    "reader": reader,
    "parquet": parquet,
    "datasets_map": datasets_map,
}


def main() -> None:
    name, root = sys.argv[1:]
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    # More threads would only take turns on the one core.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import trace_opd  # noqa: F401, I001 - sets Arrow's memory pool before Arrow loads
    import pyarrow as pa

    pa.set_cpu_count(1)
    measured = IMPLEMENTATIONS[name](root)
    print(json.dumps(measured | {"peak_rss_mib": peak_rss_mib()}))


def peak_rss_mib() -> float:
    """This process's peak in MiB (Linux); `ru_maxrss` would include its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    main()
