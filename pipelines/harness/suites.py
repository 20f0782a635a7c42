"""Suites: several benchmarks with one config, summed up in one table.

`trace-opd evaluate --suite` calls this. Each benchmark is a problems dataset and an evaluate
dataset of its own, so an interrupted suite goes on where it stopped. The figures over all
benchmarks are those of an evaluation of several sources: unweighted means, resampled within each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...data.store import Dataset, Store
from ...schemas.configs import EvaluateConfig, HubSource, ProblemsConfig
from ...schemas.errors import InputError
from ...schemas.tables import PROBLEMS
from ..pipeline import run_stage
from ..stages import REGISTRY
from ..stages.base import Plan

NO_FIGURE = {"value": None, "ci95": None}


@dataclass(frozen=True)
class Suite:
    """presets: of source hub, in the table's order. settings: of EvaluateConfig, by key, as in the
    source of the suite's reported figures."""

    presets: tuple[str, ...]
    settings: dict[str, Any]


SUITES = {
    # arXiv 2605.10194; it does not give the limit on response tokens.
    "paper": Suite(
        ("math-500", "aime-2024", "aime-2025", "amc-2023", "gpqa-diamond"),
        {"k": 8, "sampling.temperature": 0.6, "sampling.top_p": 0.95, "sampling.top_k": 20},
    )
}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a suite, before it runs. problems: None: to be downloaded."""

    preset: str
    config: ProblemsConfig
    problems: Dataset | None

    @property
    def dataset(self) -> str:
        """Its id on the hub."""
        from ...data.sources.hub import PRESETS

        return PRESETS[self.preset].dataset

    @property
    def left_out(self) -> int:
        """Problems whose gold answer does not parse."""
        return 0 if self.problems is None else self.problems.summary["unparsable"]


def require_suite(name: str, config: EvaluateConfig) -> Suite:
    """A suite by its name.

    Raises:
        InputError: no such suite, or the config names problems of its own.
    """
    if name not in SUITES:
        raise InputError(f"--suite {name!r} is unknown; known: {', '.join(SUITES)}")
    default = type(config).model_fields["problems"].default
    if config.problems != default:
        raise InputError(
            f"problems is {config.problems!r}, and --suite {name} has problems of its own; leave "
            "one of them out"
        )
    return SUITES[name]


def differences(suite: Suite, config: EvaluateConfig) -> list[str]:
    """Settings of a config that are not the suite's, a line each."""
    given = config.model_dump()
    found = []
    for key, wanted in suite.settings.items():
        value: Any = given
        for name in key.split("."):
            value = value[name]
        if value != wanted:
            found.append(f"{key} is {value}, the suite's is {wanted}")
    return found


def benchmarks(name: str, store: Store, limit: int | None) -> Iterator[Benchmark]:
    """The benchmarks of a suite. Those in the store are not looked up on the hub again.

    limit: at most so many problems of each.
    """
    for preset in SUITES[name].presets:
        source = HubSource(kind="hub", preset=preset)
        config = ProblemsConfig(source=source, split="test", limit=limit, drop_unparsable=True)
        alias = problems_alias(name, preset, limit)
        known = store.get(alias, PROBLEMS) if alias in store.aliases() else None
        if known is not None and known.manifest["config"] != config.model_dump(mode="json"):
            known = None  # someone else's dataset has the name
        yield Benchmark(preset, config, known)


def problems_alias(suite: str, preset: str, limit: int | None) -> str:
    """The name of a benchmark's problems."""
    return f"{suite}-{preset}" if limit is None else f"{suite}-{preset}-first-{limit}"


def make_problems(name: str, store: Store, limit: int | None) -> list[Benchmark]:
    """Download the benchmarks that are not in the store.

    Raises:
        InputError: names the benchmark that does not load.
    """
    made = []
    for one in benchmarks(name, store, limit):
        problems = one.problems
        if problems is None:
            alias = problems_alias(name, one.preset, limit)
            problems = run_stage("problems", one.config, store, alias)
        assert isinstance(problems, Dataset)
        made.append(Benchmark(one.preset, one.config, problems))
    return made


def evaluate_benchmark(one: Benchmark, config: EvaluateConfig, store: Store, alias: str) -> Dataset:
    """The evaluate dataset of a benchmark whose problems are made. alias: prefix of its name."""
    made = run_stage("evaluate", benchmark_config(one, config), store, f"{alias}-{one.preset}")
    assert isinstance(made, Dataset)
    return made


def benchmark_config(one: Benchmark, config: EvaluateConfig) -> EvaluateConfig:
    """The config of a benchmark's evaluation, whose problems are made."""
    assert one.problems is not None
    return config.model_copy(update={"problems": one.problems.ref})


def begin(one: Benchmark, config: EvaluateConfig, store: Store) -> tuple[Plan, Any]:
    """The plan and the dataset or draft of a benchmark's evaluation, whose problems are made."""
    return REGISTRY["evaluate"].load().begin(benchmark_config(one, config), store)


def suite_summary(config: EvaluateConfig, made: dict[str, Dataset]) -> dict[str, Any]:
    """Figures of a suite, as of an evaluation whose sources are the benchmarks.

    made: evaluate datasets by preset. A mean over benchmarks is null unless all of them have the
    figure: without one of them it would be the mean of another suite.
    """
    from ..stages.evaluate import summarize

    plan = Plan(config, {}, {}, 0)
    summary = summarize(plan, (dataset.read() for dataset in made.values()))
    paired = {
        preset: dataset.summary["paired_difference"]
        for preset, dataset in made.items()
        if "paired_difference" in dataset.summary
    }
    rows = [*summary["policies"].values()]
    if paired:
        rows.append(summary["paired_difference"])
        summary["paired_difference"]["sources"] = paired
    for row in rows:
        for figure in [name for name in row if "@" in name]:
            if any(own[figure]["value"] is None for own in row["sources"].values()):
                row[figure] = NO_FIGURE
    return summary
