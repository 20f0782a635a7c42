"""Engine local: the teacher's distribution at routed tokens is that of the plain model."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.scoring.local import LocalEngine
from trace_opd.schemas.configs import LocalTeacher, PolicyConfig, ScoreConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace.policy import load_policy


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """micro with other weights."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(resolve_policy("micro"), folder)
    policy = load_policy(str(folder), "cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    policy.model.save_pretrained(folder)
    return str(folder)


def score(vocabulary, sequences, **fields) -> list[Any]:
    return LocalEngine(ScoreConfig(**fields)).open(vocabulary).score(sequences)


@torch.no_grad()
def plain(model, prompt, response, temperature) -> torch.Tensor:
    """Log-probabilities of all tokens at each place of a response, (response, vocab) float64."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_scores_are_those_of_the_plain_model(vocabulary, sequences, micro, other, temperature):
    teacher = load_policy(other, "cpu").model
    local = LocalTeacher(policy=PolicyConfig(path=other))
    fields = {"teacher": local, "k": 5, "student": PolicyConfig(), "temperature": temperature}
    scored = score(vocabulary, sequences, micro_batch_tokens=400, **fields)
    for sequence, one in zip(sequences, scored, strict=True):
        where = sequence.routed_positions
        heat = temperature or sequence.temperature
        q = plain(teacher, sequence.teacher_prompt_ids, sequence.token_ids, heat)[where]
        p = plain(micro.model, sequence.prompt_ids, sequence.token_ids, sequence.temperature)[where]
        top = q.topk(5)
        np.testing.assert_allclose(one.top_logprobs, top.values, atol=1e-4)
        assert np.mean(one.token_ids == top.indices.numpy()) > 0.99  # but for ties
        rest = q.scatter(1, top.indices, -torch.inf).logsumexp(-1)
        np.testing.assert_allclose(one.tail, rest, atol=1e-4)
        own = q.gather(1, torch.tensor(sequence.token_ids[where].astype(int))[:, None])[:, 0]
        np.testing.assert_allclose(one.logprobs, own, atol=1e-4)
        np.testing.assert_allclose(one.teacher_entropy, -(q.exp() * q).sum(-1), atol=1e-4)
        np.testing.assert_allclose(one.student_entropy, -(p.exp() * p).sum(-1), atol=1e-4)
        np.testing.assert_allclose(one.divergence, (p.exp() * (p - q)).sum(-1), atol=1e-4)


def test_the_same_config_gives_the_same_bytes(vocabulary, sequences):
    first, again = (score(vocabulary, sequences, k=7) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        for left, right in zip(one.arrays(), other.arrays(), strict=True):
            assert (left is None) == (right is None)
            assert left is None or left.tobytes() == right.tobytes()


def test_rows_are_cut_to_the_token_budget_without_another_result(vocabulary, sequences):
    one, many = (score(vocabulary, sequences, k=7, micro_batch_tokens=n) for n in (10**6, 150))
    for left, right in zip(one, many, strict=True):
        np.testing.assert_allclose(left.top_logprobs, right.top_logprobs, atol=1e-4)
        np.testing.assert_allclose(left.tail, right.tail, atol=1e-4)


def test_all_of_the_vocabulary_leaves_no_tail(vocabulary, sequences):
    (scored,) = score(vocabulary, sequences[:1], k=10**6)
    assert scored.token_ids.shape[1] == vocabulary.size
    assert set(scored.tail.tolist()) == {-9999.0}
    np.testing.assert_allclose(np.exp(scored.top_logprobs).sum(1), 1, atol=1e-5)


def changed(folder: Path, **config) -> str:
    """micro in a folder, with other entries of its config."""
    shutil.copytree(resolve_policy("micro"), folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return str(folder)


def test_a_sequence_beyond_the_teachers_context_is_one_sentence(vocabulary, sequences, tmp_path):
    short = changed(tmp_path / "short", max_position_embeddings=24)
    local = LocalTeacher(policy=PolicyConfig(path=short))
    with pytest.raises(InputError, match=r"rollout .* do not fit into the context of 24 tokens of"):
        score(vocabulary, sequences, teacher=local)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_another_vocabulary_is_one_sentence(vocabulary, sequences, micro, tmp_path, role):
    foreign = changed(tmp_path / "foreign")
    tokenizer = type(micro.tokenizer).from_pretrained(foreign)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(foreign)
    policy = PolicyConfig(path=foreign)
    given: dict[str, Any] = (
        {"student": policy} if role == "student" else {"teacher": LocalTeacher(policy=policy)}
    )
    engine: Any = LocalEngine(ScoreConfig(**given))
    with pytest.raises(InputError, match=f"^{role} .*: has another vocabulary than the policy"):
        engine.identity(vocabulary, None)
