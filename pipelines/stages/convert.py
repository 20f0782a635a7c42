"""Stage convert: annotated rollouts become routed sequences; the registry loads its `STAGE`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset, Draft, Store, content_hash
from ...schemas.configs import ConvertConfig
from ...schemas.errors import InputError
from ...schemas.labels import Route
from ...schemas.tables import ANNOTATIONS, ROUTED
from ...trace.align import byte_table
from ...trace.policy import load_tokenizer, vocab_fingerprint, vocab_size
from ...trace.route import needs_annotations, rule_source
from ...trace.routed import routed_table
from ..models import resolve_policy
from ..samplers.vocabulary import check_token_ids, check_vocabulary
from .base import PartMaker, Plan, Stage


def _resolve(config: ConvertConfig, store: Store) -> Plan:
    annotations = store.get(config.annotations, ANNOTATIONS)
    if needs_annotations(config.routing):
        _check_annotator(annotations)
    verdicts = annotations.input("verdicts")
    rollouts = verdicts.input("rollouts")
    policy = config.policy
    tokenizer = load_tokenizer(resolve_policy(policy.path, weights=False), policy.trust_remote_code)
    makers = rollouts.read_part(0, ["policy_name", "vocab_fingerprint"])
    check_vocabulary(makers, vocab_fingerprint(tokenizer), policy.path)
    inputs = {
        "annotations": annotations,
        "verdicts": verdicts,
        "rollouts": rollouts,
        "problems": rollouts.input("problems"),
    }
    pieces = [piece.hex() for piece in byte_table(tokenizer).pieces]
    semantic: dict[str, Any] = {
        "routing": config.routing.semantic(),
        "tokens": content_hash(pieces),  # which segment a token belongs to follows from its bytes
    }
    if (source := rule_source(config.routing.rule)) is not None:
        semantic["rule"] = content_hash(source)
    return Plan(config, inputs, semantic, annotations.parts)


def _check_annotator(annotations: Dataset) -> None:
    annotator = annotations.manifest["config"].get("annotator", {})
    if annotator.get("engine") == "none":
        raise InputError(
            f"dataset {annotations.ref}: annotator none marked nothing, and this routing needs "
            "annotations; annotate with another engine, or set routing.rule and teacher_context to "
            "what needs none"
        )


@contextmanager
def _open(plan: Plan, draft: Draft) -> Iterator[PartMaker]:
    config: ConvertConfig = plan.config
    path = resolve_policy(config.policy.path, weights=False)
    pieces = byte_table(load_tokenizer(path, config.policy.trust_remote_code))
    vocab = vocab_size(path, config.policy.trust_remote_code)
    roles = ("problems", "rollouts", "verdicts", "annotations")

    def make(part: int) -> pa.Table:
        problems, rollouts, verdicts, annotations = (
            plan.inputs[role].read_part(part) for role in roles
        )
        check_token_ids(rollouts, vocab, f"{plan.inputs['rollouts'].ref}, part {part}")
        return routed_table(problems, rollouts, verdicts, annotations, pieces, config.routing)

    yield make


def _summarize(plan: Plan, tables: Iterator[pa.Table]) -> dict:
    rows = signal = 0
    routed = np.zeros(len(Route), dtype=np.int64)
    coverage = [np.empty(0, dtype=np.float32)]
    for table in tables:
        rows += len(table)
        routes = pc.list_flatten(table["route"]).to_numpy()
        routed += [np.count_nonzero(routes == int(route)) for route in Route]
        coverage.append(table["coverage"].to_numpy())
        signal += int(np.count_nonzero(table["advantage"].to_numpy()))
    return {
        "sequences": rows,
        "tokens": int(routed.sum()),
        "tokens_per_route": {r.name.lower(): int(routed[r]) for r in Route},
        "mean_coverage": round(float(np.mean(np.concatenate(coverage), dtype=np.float64)), 4)
        if rows
        else None,
        "sequences_with_advantage": signal,
    }


STAGE = Stage(
    "convert",
    ConvertConfig,
    ROUTED,
    _resolve,
    _open,
    _summarize,
    ("route", "coverage", "advantage"),
)
