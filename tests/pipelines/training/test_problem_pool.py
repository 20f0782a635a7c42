"""Problems of online steps by difficulty: bands, curriculum, no state, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.stages import REGISTRY, train
from trace_opd.pipelines.training.problem_pool import ProblemPool
from trace_opd.pipelines.viewer.report_page import run as write_report
from trace_opd.schemas.configs import ReportConfig, TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config
from trace_opd.schemas.tables import EVALUATIONS, PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.tests.pipelines.viewer.test_report_page import text_of

CONFIG = Path(__file__).parents[3] / "configs" / "micro.yaml"
COUNT = 12
SMALL = ["offline.steps=0", "online.steps=4", "groups_per_step=2", "online.group_size=2"]
PROBLEM = {
    "answer": "3", "answer_kind": "math", "solution": None, "source": "test", "split": "train",
    "steps": [{"text": "So 3.", "value": "3", "type": "arithmetic", "key": True}],
}  # fmt: skip


def problem(number: int) -> dict[str, Any]:
    level = None if number == 11 else f"Level {number % 4 + 1}"
    text = f"What is {number} + {number}?"
    return PROBLEM | {"problem_id": f"p{number:02}", "problem": text, "level": level}


@pytest.fixture
def store(tmp_path) -> Store:
    """Problems p00 to p11; in `rates` the pass rate of p00 to p10 is their number / 10."""
    store = Store(tmp_path / "store")
    draft = store.begin("problems", {"made": "here"}, {}, PROBLEMS)
    draft.write_part(0, PROBLEMS.table(problem(number) for number in range(COUNT)))
    problems = draft.finish(1)
    store.set_alias("problems", problems)
    evaluation = {
        "source": "test", "policy": "base", "policy_name": "m", "policy_revision": "0",
        "majority_correct": None, "mean_tokens": None, "truncated": 0, "unscored": 0,
    }  # fmt: skip
    rows = [
        evaluation | {"evaluation_id": f"e{n}", "problem_id": f"p{n:02}", "k": 10, "correct": n}
        for n in range(COUNT - 1)
    ]
    rows.append(evaluation | {"evaluation_id": "e11", "problem_id": "p11", "k": 0, "correct": 0})
    draft = store.begin("evaluate", {"made": "here"}, {"problems": problems}, EVALUATIONS)
    draft.write_part(0, EVALUATIONS.table(rows))
    store.set_alias("rates", draft.finish(1))
    return store


def config_of(pool: str, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, CONFIG, [*SMALL, f"online.pool={pool}", *overrides], "train")


def pool_of(store: Store, pool: str, *overrides: str) -> ProblemPool:
    config = config_of(pool, *overrides)
    inputs, _ = train.begin(config, store)
    return ProblemPool(config, inputs["problems"].read(), inputs, inputs["problems"].ref)


def drawn(pool: ProblemPool, step: int, refill: int = 0) -> list[int]:
    return pool.draw(step, refill).tolist()


EASY = "{rates: rates, unmeasured: leave_out, bands: [{band: [0.5, 0.8]}]}"
CURRICULUM = (
    "{rates: rates, unmeasured: leave_out, "
    "bands: [{band: [0.7, 1]}, {from_step: 3, band: [0, 0.3]}]}"
)


def test_a_pass_goes_over_the_band_and_no_further(store):
    pool = pool_of(store, EASY)
    first = [drawn(pool, step) for step in (0, 1)]
    assert sorted(sum(first, [])) == [5, 6, 7, 8]  # noqa: RUF017
    assert sorted(drawn(pool, 2) + drawn(pool, 3)) == [5, 6, 7, 8]
    for step in range(4):
        rounds = [drawn(pool, step, refill) for refill in range(3)]
        assert [len(rows) for rows in rounds] == [2, 2, 0]
        assert sorted(rounds[0] + rounds[1]) == [5, 6, 7, 8]


def test_bands_follow_each_other_at_their_steps(store):
    pool = pool_of(store, CURRICULUM)
    for step in range(3):
        assert set(drawn(pool, step)) <= {7, 8, 9, 10}
    for step in range(3, 9):
        assert set(drawn(pool, step)) <= {0, 1, 2, 3}
    assert sorted(drawn(pool, 3) + drawn(pool, 4)) == [0, 1, 2, 3]  # a pass begins with the band


def test_a_draw_depends_on_seed_and_step_alone(store):
    order = [(step, refill) for step in range(6) for refill in range(2)]
    first, again = pool_of(store, CURRICULUM), pool_of(store, CURRICULUM)
    draws = {at: drawn(first, *at) for at in order}
    assert {at: drawn(again, *at) for at in reversed(order)} == draws
    other = pool_of(store, CURRICULUM, "seed=9")
    assert {at: drawn(other, *at) for at in order} != draws


def test_problems_without_a_rate_are_in_every_band_or_in_none(store):
    kept = pool_of(store, "{rates: rates, bands: [{band: [0.1, 0.2]}]}", "groups_per_step=9")
    assert sorted(drawn(kept, 0)) == [1, 2, 11]
    left = pool_of(
        store,
        "{rates: rates, unmeasured: leave_out, bands: [{band: [0, 1]}]}",
        "groups_per_step=99",
    )
    assert sorted(drawn(left, 0)) == list(range(11))


def test_levels_are_the_first_number_of_their_text(store, caplog):
    pool = pool_of(store, "{unmeasured: leave_out, bands: [{band: [3, 4]}]}", "groups_per_step=9")
    assert sorted(drawn(pool, 0)) == [2, 3, 6, 7, 10]
    assert "groups_per_step is 9, the band [3, 4] from step 0 has 5 problems" in caplog.text


def verdicts(store: Store) -> Dataset:
    """Of p00 one of two is right, of p01 both, of p02 one is unscored and the other wrong."""
    problems = store.get("problems")
    drafts = store.begin("rollout", {"made": "here"}, {"problems": problems}, ROLLOUTS)
    rollouts = drafts.finish(0)
    draft = store.begin("verify", {"made": "here"}, {"rollouts": rollouts}, VERDICTS)
    judged = [(0, True), (0, False), (1, True), (1, True), (2, None), (2, False)]
    rows = [
        {
            "rollout_id": f"r{row}", "problem_id": f"p{number:02}", "group_id": f"g{number}",
            "reward": None if right is None else float(right), "correct": right,
            "parsed_answer": None, "status": "ok", "verifier": "test", "seconds": 0.0,
        }
        for row, (number, right) in enumerate(judged)
    ]  # fmt: skip
    draft.write_part(0, VERDICTS.table(rows))
    made = draft.finish(1)
    store.set_alias("judged", made)
    return made


def test_verdicts_give_the_rates_of_what_was_sampled(store):
    verdicts(store)
    for band, rows in (("[0.5, 0.5]", [0]), ("[1, 1]", [1]), ("[0, 0]", [2])):
        pool = f"{{rates: judged, unmeasured: leave_out, bands: [{{band: {band}}}]}}"
        assert drawn(pool_of(store, pool), 0) == rows


def test_an_evaluation_of_a_trained_policy_gives_its_rates(store):
    table = store.get("rates").read().to_pylist()
    trained = [
        row
        | {"policy": "trained", "evaluation_id": "t" + row["evaluation_id"], "correct": 10, "k": 10}
        for row in table[:3]
    ]
    draft = store.begin(
        "evaluate", {"made": "both"}, {"problems": store.get("problems")}, EVALUATIONS
    )
    draft.write_part(0, EVALUATIONS.table(table + trained))
    store.set_alias("both", draft.finish(1))
    pool = pool_of(
        store, "{rates: both, unmeasured: leave_out, bands: [{band: [1, 1]}]}", "groups_per_step=9"
    )
    assert sorted(drawn(pool, 0)) == [0, 1, 2]


def test_an_id_follows_the_rates_and_the_bands_and_not_an_alias(store):
    _, first = train.begin(config_of(EASY), store)
    store.set_alias("again", store.get("rates"))
    _, alias = train.begin(config_of(EASY.replace("rates: rates", "rates: again")), store)
    assert alias.ref == first.ref
    _, band = train.begin(config_of(EASY.replace("0.8", "0.9")), store)
    assert band.ref != first.ref
    inputs, _ = train.begin(config_of(EASY), store)
    assert inputs["pool_rates"].ref == store.get("rates").ref
    plain = load_config(TrainConfig, CONFIG, SMALL, "train")
    assert "pool" not in plain.semantic()["online"]


@pytest.mark.parametrize(
    ("pool", "sentence"),
    [
        ("{bands: []}", "bands"),
        ("{bands: [{from_step: 1, band: [0, 1]}]}", "from_step is 1; begin at 0 and ascend"),
        ("{bands: [{band: [0, 1]}, {band: [0, 1]}]}", "from_step is 0, 0; begin at 0"),
        ("{bands: [{band: [1, 0.5]}]}", "band 0 is .1, 0.5.; give .least, most."),
        ("{rates: rates, bands: [{band: [1, 2]}]}", "band 0 ends at 2; pass rates are 0 to 1"),
        ("{bands: [{band: [-1, 2]}]}", "band"),
        ("{rates: nothing, bands: [{band: [0, 1]}]}", "dataset 'nothing' is not in store"),
        (
            "{rates: problems, bands: [{band: [0, 1]}]}",
            "holds problems; give verdicts or evaluations of the training problems",
        ),
        (
            "{rates: rates, unmeasured: leave_out, bands: [{band: [0.11, 0.19]}]}",
            r"the band \[0.11, 0.19\] from step 0 has none of the 12 problems of problems/.*0 to 1",
        ),
        (
            "{unmeasured: leave_out, bands: [{band: [1, 2]}, {from_step: 2, band: [9, 9]}]}",
            r"the band \[9, 9\] from step 2 has none .* \(they are 1 to 4\); widen it",
        ),
    ],
)
def test_a_pool_that_can_not_be_drawn_from_is_refused_before_any_work(store, pool, sentence):
    with pytest.raises(InputError, match=sentence):
        train.begin(config_of(pool), store)


def test_rates_of_other_problems_are_refused(store):
    draft = store.begin("problems", {"made": "there"}, {}, PROBLEMS)
    draft.write_part(0, PROBLEMS.table([problem(0) | {"problem_id": "q"}]))
    store.set_alias("others", draft.finish(1))
    with pytest.raises(
        InputError, match=r"no problem of problems/\S+ has a pass rate in evaluate/"
    ):
        train.begin(config_of(EASY, "online.problems=others"), store)


def test_a_run_asks_the_problems_of_its_pool_and_a_stopped_one_the_same(store):
    overrides = ["limit=12", "rows_per_part=12"]
    for stage, given in (("problems", overrides), ("rollout", ["group_size=4"]), ("verify", [])):
        run_stage(stage, load_config(REGISTRY[stage].config_type, CONFIG, given, stage), store)
    pool = "{rates: verdicts, bands: [{band: [0.25, 1]}]}"
    config = load_config(
        TrainConfig, CONFIG, [*SMALL, "online.steps=2", f"online.pool={pool}"], "train"
    )
    made = run_stage("train", config, store)
    assert isinstance(made, Dataset)
    judged = store.get("verdicts").read(["problem_id", "correct"]).to_pylist()
    right = {row["problem_id"] for row in judged if row["correct"]}
    rollouts = store.get(made.summary["tables"]["rollouts"])
    for part in range(2):
        asked = set(rollouts.read_part(part, ["problem_id"])["problem_id"].to_pylist())
        assert len(asked) == 2
        assert asked <= right
    assert made.manifest["inputs"]["pool_rates"] == store.get("verdicts").ref
    assert made.summary["pool"] == [
        {"from_step": 0, "band": [0.25, 1.0], "problems": len(right)},
    ]
    page = write_report(ReportConfig(dataset=made.ref), store).read_text("utf-8")
    head = f"Problems by difficulty bands of the pass rate in {store.get('verdicts').ref}"
    assert head in text_of(page)
    assert f"0 – 1 0.25 – 1 {len(right)} " in text_of(page)
