"""Stage rollout: a group of responses per problem; the registry loads its `STAGE`."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Draft, Store
from ...schemas.configs import RolloutConfig
from ...schemas.labels import FinishReason
from ...schemas.tables import PROBLEMS, ROLLOUTS
from ..samplers import sampling_engine
from ..samplers.context_length import require_room
from ..samplers.kept import keeping
from ..samplers.rollouts import require_planned, rollouts_table
from ..samplers.trainable import warn_after, warn_before
from .base import PartMaker, Plan, Stage


def _resolve(config: RolloutConfig, store: Store) -> Plan:
    problems = store.get(config.problems, PROBLEMS)
    semantic = config.semantic()
    del semantic["problems"]  # the dataset's id stands for it
    engine = sampling_engine(config.sampler, config.policy)
    semantic["policy"] = engine.identity()
    limit = config.sampling.max_new_tokens
    require_room(problems, config.policy, engine.context(), config.prompt, limit)
    warn_before(config)
    work = tuple(rows * config.group_size for rows in problems.part_rows)
    return Plan(config, {"problems": problems}, semantic, problems.parts, {}, work, "responses")


@contextmanager
def _open(plan: Plan, draft: Draft) -> Iterator[PartMaker]:
    config: RolloutConfig = plan.config
    sampler, tokenizer = sampling_engine(config.sampler, config.policy).open()
    with closing(sampler):
        require_planned(plan.semantic["policy"], sampler.policy)

        def make(part: int) -> pa.Table:
            problems = plan.inputs["problems"].read_part(part)
            size, seed = config.group_size, config.seed
            with keeping(sampler, draft, part):
                made = rollouts_table(
                    problems, sampler, tokenizer, config.prompt, config.sampling, size, seed
                )
            if part == 0:
                warn_after(made, config)
            return made

        yield make


def _summarize(plan: Plan, tables: Iterator[pa.Table]) -> dict:
    rollouts = tokens = truncated = on_policy = 0
    for table in tables:
        rollouts += len(table)
        tokens += pc.sum(pc.list_value_length(table["token_ids"])).as_py() or 0
        truncated += table["finish_reason"].to_pylist().count(FinishReason.LENGTH)
        on_policy += table["on_policy"].to_pylist().count(True)
    return {
        "rollouts": rollouts,
        "mean_tokens": round(tokens / on_policy, 2) if on_policy else None,
        "truncated": truncated,
        "off_policy": rollouts - on_policy,
    }


STAGE = Stage("rollout", RolloutConfig, ROLLOUTS, _resolve, _open, _summarize)
