"""Stage score's engine vllm and real vLLM: a server's scores are those of the same model here.

Run by `make test-vllm`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.scoring.engine import Vocabulary
from trace_opd.pipelines.scoring.local import LocalEngine
from trace_opd.pipelines.scoring.vllm import VllmEngine
from trace_opd.schemas.configs import LocalTeacher, PolicyConfig, ScoreConfig, VllmTeacher
from trace_opd.schemas.errors import InputError
from trace_opd.tests.vllm.conftest import MODEL, TOLERANCE
from trace_opd.trace.policy import load_policy
from trace_opd.trace.sequences import TrainingSequence

K = 16

pytestmark = pytest.mark.slow


def test_a_servers_scores_are_those_of_the_same_model_here(
    tmp_path: Path, make_server: Any
) -> None:
    policy = load_policy(resolve_policy(MODEL), "cpu", "float32")
    size = policy.model.config.vocab_size
    vocabulary = Vocabulary(policy.tokenizer, policy.info.vocab_fingerprint, size)
    ids = policy.tokenizer.encode("12+99=111. Then 111-4=107.", add_special_tokens=False)
    sequences = [
        TrainingSequence(
            rollout_id=str(at), group_id="g", prompt_ids=ids[:3], token_ids=np.array(ids[3:]),
            logprobs=np.zeros(len(ids) - 3, np.float32), advantage=0.0, reward=0.0, correct=True,
            route=np.array([n % (at + 2) == 0 for n in range(len(ids) - 3)], np.uint8),
            temperature=1.0, truncated=False, teacher_prompt_ids=ids[: 3 + at],
        )
        for at in range(2)
    ]  # fmt: skip
    local = ScoreConfig(k=K, teacher=LocalTeacher(policy=PolicyConfig(path=MODEL)))
    here = LocalEngine(local).open(vocabulary).score(sequences)
    server = make_server(tmp_path).start("--max-logprobs", str(K), updates=False)
    try:
        teacher = VllmTeacher(engine="vllm", base_url=server.wait().url, model="policy")
        there = VllmEngine(ScoreConfig(k=K, teacher=teacher)).open(vocabulary).score(sequences)
        for one, other in zip(here, there, strict=True):
            np.testing.assert_allclose(one.top_logprobs, other.top_logprobs, atol=TOLERANCE)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=TOLERANCE)
            np.testing.assert_allclose(np.exp(one.tail), np.exp(other.tail), atol=1e-3)
            assert np.mean(one.token_ids == other.token_ids) > 0.95  # but for near ties
        more = ScoreConfig(k=K + 1, teacher=teacher)
        with pytest.raises(InputError, match=f"vllm serve --max-logprobs {K + 1}, or lower k"):
            VllmEngine(more).open(vocabulary).score(sequences)
    finally:
        server.kill()
