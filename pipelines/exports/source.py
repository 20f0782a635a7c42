"""A routed dataset with what formats need of the tables that it was made of."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ...schemas.configs import PromptConfig
from ...schemas.errors import InputError
from ...schemas.tables import ROUTED
from ...trace.prompt import student_messages, teacher_chat
from ...trace.vocabulary import Vocabulary, load_vocabulary
from ..models import resolve_policy

if TYPE_CHECKING:
    from ...data.store import Dataset, Store


@dataclass(frozen=True)
class Part:
    """A part of the routed table and its rollouts' texts.

    responses: by rollout_id; problems: rows of the problems table by problem_id.
    """

    index: int
    table: pa.Table
    responses: dict[str, str]
    problems: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class RoutedSource:
    """dataset: the routed dataset; store: it and its inputs."""

    dataset: "Dataset"
    store: "Store"

    @cached_property
    def _run(self) -> dict[str, Any]:
        """The config of the training whose online steps made the dataset; empty if a stage did."""
        run = self.dataset.manifest["config"].get("online")
        return {} if run is None else self.store.get(run).manifest["config"]

    @cached_property
    def prompt(self) -> PromptConfig:
        """The prompt templates of the rollouts.

        Raises:
            InputError: the rollouts were imported, so nothing says their prompt.
        """
        rollouts = self.dataset.input("rollouts")
        config = self._run or rollouts.manifest["config"]
        if "prompt" not in config:
            raise InputError(
                f"dataset {rollouts.ref}: does not say its prompt, because it was imported; export "
                "format jsonl or prime-rl, which need none"
            )
        return PromptConfig.model_validate(config["prompt"])

    def vocabulary(self, policy: str | None) -> Vocabulary:
        """The vocabulary of the token ids. policy: its folder or name; None: the recorded one.

        Raises:
            InputError: no such policy, or one of another vocabulary.
        """
        recorded = (self._run or self.dataset.manifest["config"]).get("policy", {})
        path = policy or recorded.get("path")
        if path is None:
            raise InputError(f"dataset {self.dataset.ref}: does not say its policy; give --policy")
        found = load_vocabulary(resolve_policy(path, weights=False))
        makers = set(self.dataset.read(["vocab_fingerprint"])["vocab_fingerprint"].to_pylist())
        if makers - {found.fingerprint}:
            raise InputError(
                f"policy {path}: has another vocabulary than the token ids of {self.dataset.ref}; "
                "give the policy that sampled with --policy"
            )
        return found

    def student(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """The conversation that the student answers, of a problem or of a routed row."""
        return student_messages(self.prompt, row["problem"], row.get("history"))

    def teacher_turn(self, row: dict[str, Any]) -> str:
        """The teacher's user turn for a routed row; the rest of its conversation is the
        student's."""
        told = row["diagnostic_type"], row["teacher_context"]
        return teacher_chat(self.prompt, row["problem"], *told, row.get("history"))[-1]["content"]

    def parts(self, with_texts: bool = True) -> Iterator[Part]:
        """The parts in their order. with_texts: also the responses and problems."""
        for index in range(self.dataset.parts):
            table = self.dataset.read_part(index)
            responses: dict[str, str] = {}
            problems: dict[str, dict[str, Any]] = {}
            if with_texts:
                rollouts = self.dataset.input("rollouts")
                texts = rollouts.read_part(index, ["rollout_id", "response"])
                responses = {row["rollout_id"]: row["response"] for row in texts.to_pylist()}
                asked: Any = self.dataset.input("problems").read_part(index).to_pylist()
                problems = {row["problem_id"]: row for row in asked}
            yield Part(index, table, responses, problems)


def open_source(store: "Store", name: str) -> RoutedSource:
    """Raises InputError if there is no such routed dataset."""
    return RoutedSource(store.get(name, ROUTED), store)


def asked_problems(part: Part) -> list[dict[str, Any]]:
    """The problems of a part's routed rows, each once, in the rows' order."""
    ids = dict.fromkeys(map(str, part.table["problem_id"].to_pylist()))
    return [part.problems[problem_id] for problem_id in ids]
