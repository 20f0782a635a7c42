"""The runs of a study: their training, and the rows of their results. arms.py has their configs.

study.py calls these functions. Each run is a train dataset of the store: a stopped study continues
from the finished runs, studies share runs, and every figure can be traced to a run's folder.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np
import polars as pl

from ...data.store import Dataset, Store
from ...schemas.configs import TrainConfig
from ...schemas.errors import Stopped
from ..progress import progress_bar, show_nothing
from ..run_metrics import METRICS, read_metrics
from ..runtime.signals import announce, handled, stop_of
from ..stages import train
from ..training.validation import read_validation
from .arms import Run


@contextmanager
def open_pool(workers: int) -> Iterator[Executor]:
    """Training processes, each with its share of the cores; an error cancels waiting runs.

    Raises:
        Stopped, Interrupted: SIGTERM or Ctrl-C; each training has written a checkpoint.
    """
    threads = max((os.cpu_count() or 1) // workers, 1)
    context = get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(threads, stop)
    ) as pool:
        received: list[int] = []

        def receive(number: int) -> None:
            if not received:
                announce("waiting for the trainings' checkpoints, Ctrl-C again to leave them")
            received.append(number)
            raise KeyboardInterrupt

        try:
            with handled(receive):
                yield pool
        except BaseException as error:
            stop.set()
            pool.shutdown(wait=bool(received), cancel_futures=True)
            if not received:
                raise
            raise stop_of(
                received[0], "stopped; finished runs and the others' checkpoints are kept"
            ) from error


def train_all(
    runs: Sequence[Run], store: Store, pool: Executor, label: str, study: str
) -> list[Dataset]:
    """Every run's dataset, in order; trains those that the store lacks.

    Each gets an alias with the study's name, so that `trace-opd gc` keeps it.
    """
    refs: dict[str, str] = {}

    def keep(key: str, ref: str) -> None:
        refs[key] = ref
        dataset = store.get(ref)
        store.set_alias(f"{study}-train-{dataset.id[:8]}", dataset)

    futures: dict[Future[str], Run] = {}
    for key, run in {run.key: run for run in runs}.items():
        _, target = train.begin(run.train, store)
        if isinstance(target, Dataset):
            keep(key, target.ref)
        else:
            futures[pool.submit(_train, run.train, store.root)] = run
    with progress_bar(label, len(futures), "runs") as progress:
        for future in as_completed(futures):
            run = futures[future]
            keep(run.key, future.result())
            named = f"{run.arm.name} at {run.arm.point}" if run.arm.point else run.arm.name
            progress.advance(1, last=f"{named} seed {run.seed}")
    return [store.get(refs[run.key]) for run in runs]


_training = False  # in a worker: whether it trains
_stop: Any = None  # in a worker: the event that ends all trainings


def _begin(threads: int, stop: Any) -> None:
    global _stop
    _stop = stop
    # The terminal sends its Ctrl-C to the workers too. The study's process passes it on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop_training)
    show_nothing()
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threading.Thread(target=_stop_with_study, daemon=True).start()


def _stop_training(*_: object) -> None:
    """SIGTERM before the first step and after the last one."""
    if _training:
        raise Stopped


def _stop_with_study() -> None:
    _stop.wait()
    os.kill(os.getpid(), signal.SIGTERM)


def _end_with_parent() -> None:
    """End this process if the study's process is killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train(config: TrainConfig, root: str) -> str:
    global _training
    _training = True
    try:
        if _stop.is_set():
            raise Stopped
        # Without an alias: `train` remains the name of the user's own last run.
        return train.run(config, Store(root)).ref
    finally:
        _training = False


def answers(runs: Sequence[Run], made: Sequence[Dataset]) -> pl.DataFrame:
    """A row per run, evaluated step, split, decoding and problem."""
    rows = [row for run, dataset in zip(runs, made, strict=True) for row in _answers(run, dataset)]
    return pl.DataFrame(rows, infer_schema_length=None)


def _answers(run: Run, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """A run's validation rows with its arm, and its KL figures up to each row's step.

    kl_exposure: Σ λ²; coverage, kl_clipped: means over the steps with λ > 0 of the shares of tokens
    under the KL, and of those at which its clip bound; null where no step had such tokens.
    """
    steps = {0: {"kl_exposure": 0.0, "coverage": None, "kl_clipped": None}}
    covered, clipped = [], []
    for line in read_metrics(dataset.local_path(METRICS)):
        if line["kl_weight"]:
            shares = [share for name, share in line.items() if name.startswith("coverage_")]
            covered += [sum(shares)] if shares else []
            clipped += [line["kl_clipped"]] if "kl_clipped" in line else []
        steps[line["step"] + 1] = {
            "kl_exposure": line["kl_exposure"],
            "coverage": float(np.mean(covered)) if covered else None,
            "kl_clipped": float(np.mean(clipped)) if clipped else None,
        }
    known = {
        "ablation": run.arm.ablation,
        "point": run.arm.point,
        "method": run.arm.name,
        "seed": run.seed,
        "choice": " ".join(run.choice),
        "run": dataset.ref,
    }
    for row in read_validation(dataset).to_pylist():
        yield known | row | steps[row["step"]]


def results(answers: pl.DataFrame) -> pl.DataFrame:
    """A row per run, evaluated step, split and decoding, from the rows per problem."""
    keys = ["ablation", "point", "method", "seed", "choice", "run", "step", "split", "decoding"]
    weighted = pl.col("entropy") * pl.col("tokens")
    return (
        answers.group_by(keys, maintain_order=True)
        .agg(
            pass_rate=pl.when(pl.col("k").sum() > 0).then(
                pl.col("correct").sum() / pl.col("k").sum()
            ),
            entropy=weighted.sum() / pl.col("tokens").filter(pl.col("entropy").is_not_null()).sum(),
            length=pl.when(pl.col("tokens").null_count() == 0, pl.col("k").sum() > 0).then(
                pl.col("tokens").sum() / pl.col("k").sum()
            ),
            truncated=pl.col("truncated").sum(),
            problems=pl.len(),
            kl_exposure=pl.col("kl_exposure").first(),
            coverage=pl.col("coverage").first(),
            kl_clipped=pl.col("kl_clipped").first(),
        )
        .with_columns(pl.col("entropy").fill_nan(None))
        .sort(keys)
    )
