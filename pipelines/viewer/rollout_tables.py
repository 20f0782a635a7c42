"""Finds the tables behind a dataset's rollouts, the policy's tokenizer, and a page's rollouts.

Called by view.py and report_page.py, by `trace-opd show`, and by compare/.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

from ...data.dataset import find_dataset
from ...data.store import Dataset, Store
from ...schemas.errors import InputError
from ...schemas.tables import ANNOTATIONS, ROUTED, SCORES, VERDICTS
from ...trace.vocabulary import Vocabulary, load_vocabulary
from ..models import resolve_policy
from ..terminal import visible

logger = logging.getLogger(__name__)

TRUST = "TRACE_OPD_TRUST_REMOTE_CODE"
_ROLES = ("routed", "annotations", "verdicts", "rollouts", "problems")


@dataclass(frozen=True)
class Tables:
    """A dataset of rollouts and the tables behind it, by role, the most processed one first."""

    by_role: dict[str, Dataset]

    @property
    def lead(self) -> Dataset:
        return next(iter(self.by_role.values()))


def find_tables(dataset: Dataset, store: Store) -> Tables:
    """The tables behind a dataset's rollouts.

    dataset: routed, annotations, verdicts, scores or a train run. Scores give the routed table that
    they are of. A train run gives its online tables, or if it has none, the routed table that it
    was trained on.

    Raises:
        InputError: the dataset is of none of these kinds.
    """
    if dataset.stage == "train":
        refs = dataset.summary.get("tables") or {"routed": dataset.manifest["inputs"]["routed"]}
        found = {role: store.get(ref) for role, ref in refs.items()}
    elif dataset.contract is SCORES:
        found = {"routed": dataset.input("routed")}
    elif dataset.contract in (ROUTED, ANNOTATIONS, VERDICTS):
        found = {dataset.contract.name: dataset}
    else:
        raise InputError(
            f"dataset {dataset.ref} holds {dataset.manifest['table'] or 'no table'}; give a routed "
            "or an annotations dataset, verdicts, scores or a train run"
        )
    ordered: dict[str, Dataset] = {}
    for role in _ROLES:
        made_from = [known for known in ordered.values() if role in known.manifest["inputs"]]
        if role in found:
            ordered[role] = found[role]
        elif made_from:
            ordered[role] = made_from[0].input(role)
    return Tables(ordered)


def find_counterpart(ref: str, tables: Tables, store: Store) -> Dataset:
    """The annotations dataset that a dataset's annotations are compared with.

    Raises:
        InputError: one of the two holds no annotations, or they annotate different rollouts.
    """
    against, lead = store.get(ref, ANNOTATIONS), tables.lead
    if lead.contract is not ANNOTATIONS:
        raise InputError(
            f"dataset {lead.ref} holds {lead.manifest['table']}; annotators are compared on their "
            f"annotations datasets ({tables.by_role['annotations'].ref})"
            if "annotations" in tables.by_role
            else f"dataset {lead.ref} is not annotated; name an annotations dataset"
        )
    ours, theirs = (
        tables.by_role["rollouts"].ref,
        find_tables(against, store).by_role["rollouts"].ref,
    )
    if ours != theirs:
        raise InputError(
            f"datasets {lead.ref} and {against.ref} annotate different rollouts ({ours}, "
            f"{theirs}); name annotations of the same ones"
        )
    return against


def annotator_labels(first: Dataset, second: Dataset) -> tuple[str, str]:
    """Two different names for two annotations datasets."""
    names = [_annotator_name(dataset) for dataset in (first, second)]
    if names[0] == names[1]:
        names = [
            f"{name} {dataset.id[:8]}" for name, dataset in zip(names, (first, second), strict=True)
        ]
    return names[0], names[1]


def _annotator_name(dataset: Dataset) -> str:
    annotator = dataset.manifest["config"].get("annotator")
    name = annotator.get("name") if isinstance(annotator, dict) else None
    return visible(name or dataset.id[:8])


def find_vocabulary(dataset: Dataset, tables: Tables) -> Vocabulary | None:
    """The vocabulary of the policy that sampled; None if its tokenizer is not here.

    None also for a dataset that is not routed: its tokens have no paint of their own.
    """
    if "routed" not in tables.by_role:
        return None
    configs = [dataset.manifest["config"], made_by(tables.by_role["rollouts"])]
    policies = [config["policy"] for config in configs if "policy" in config]
    if not policies:
        return None
    try:
        return policy_vocabulary(policies[0])
    except InputError as error:
        logger.info("painting by estimate, not by token: %s", error)
        return None


def policy_vocabulary(policy: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a manifest's policy, from files on this machine.

    Python code that comes with it runs only if policy.trust_remote_code and the environment
    variable TRACE_OPD_TRUST_REMOTE_CODE=1 both allow it: a store may be someone else's work, and
    its manifest alone must not start a program.

    Raises:
        InputError: the tokenizer is not on this machine, or needs code that may not run.
    """
    folder = resolve_policy(policy["path"], weights=False, download=False)
    wanted = policy.get("trust_remote_code") is True
    allowed = os.environ.get(TRUST) == "1"
    try:
        return load_vocabulary(folder, trust_remote_code=wanted and allowed)
    except InputError:
        if wanted and not allowed:
            logger.warning(
                "policy %s: its tokenizer may need Python code that comes with it; read that code, "
                "then set %s=1 to run it",
                folder,
                TRUST,
            )
        raise


def routing_rule(tables: Tables) -> str:
    """`routing.rule` of the routed table; spans if nothing is routed or the rule is unknown."""
    if "routed" not in tables.by_role:
        return "spans"
    config = made_by(tables.by_role["routed"])
    return config.get("online", config).get("routing", {}).get("rule", "spans")


def made_by(dataset: Dataset) -> dict[str, Any]:
    """A dataset's config; for a table made in training, the config of its finished run."""
    config = dataset.manifest["config"]
    if (run := config.get("online")) is None:
        return config
    found = find_dataset(dataset.files, run)
    return found.manifest["config"] if found is not None else {}


def choose_groups(lead: Dataset, limit: int) -> list[str]:
    """Rollout ids of complete groups, evenly spread over the dataset, at most `limit`."""
    table = lead.read(["rollout_id", "group_id"])
    groups: dict[str, list[str]] = {}
    for rollout_id, group_id in zip(*(column.to_pylist() for column in table), strict=True):
        groups.setdefault(group_id, []).append(rollout_id)
    everything = list(groups.values())
    count = min(len(everything), max(1, limit * len(everything) // max(1, len(table))))
    spread = [everything[i * len(everything) // count] for i in range(count)] if count else []
    return [rollout_id for group in spread for rollout_id in group][:limit]
