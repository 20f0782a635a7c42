"""Settings of the objective that would have no effect, or that no token could meet, are refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from trace_opd.schemas.configs import LossConfig, TrainConfig

DIVERGENCE = {"of": "divergence", "shape": "above", "at": 0.1}


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"policy": "gspo", "truncated_importance": 2.0}, "a bound of policy grpo"),
        ({"policy": "cispo", "grpo": False}, "no effect with grpo=false"),
        ({"sapo_tau_negative": 2.0}, "without policy sapo"),
        ({"reweight_clip": 1.5}, "turn the advantage's sign"),
        ({"reweight": "inverse", "reweight_clip": 1.5}, "turn the advantage's sign"),
        ({"reweight_scale": 2.0}, "reweight_scale has no effect"),
        ({"reweight_threshold": 0.1}, "reweight_threshold has no effect on reweight ratio"),
        ({"top_k": 5, "backend": "triton"}, "top_k has no form in backend triton"),
    ],
)
def test_a_loss_setting_without_effect_is_refused(loss, words):
    with pytest.raises(ValidationError, match=words):
        LossConfig(**loss)


@pytest.mark.parametrize(
    "loss",
    [
        {"policy": "sapo", "sapo_tau_negative": 2.0},
        {"reweight": "one_sided", "reweight_clip": 5.0, "reweight_threshold": 0.5},
        {"reweight": "bounded", "reweight_scale": 0.02, "reweight_threshold": 0.02},
        {"top_k": 5, "backend": "torch"},
    ],
)
def test_the_same_setting_where_it_has_one_is_kept(loss):
    assert LossConfig(**loss).model_dump().items() >= loss.items()


def trained(loss: dict[str, Any], **config: Any) -> TrainConfig:
    return TrainConfig.model_validate({"loss": loss, "online": {"steps": 1}} | config)


@pytest.mark.parametrize("signal", ["divergence", "importance"])
def test_a_gate_reads_no_divergence_of_reweighted_tokens(signal):
    gates = [DIVERGENCE | {"of": signal}]
    online = {"steps": 1, "routing": {"key": "fkl", "error": "reweight"}}
    with pytest.raises(ValidationError, match=r"loss\.gates reads a divergence"):
        trained({"gates": gates}, online=online)
    trained({"gates": [DIVERGENCE | {"of": "teacher_entropy"}]}, online=online)
    trained({"gates": gates})


def test_scores_have_their_own_k():
    scores = {"teacher": {"scores": "scores"}, "offline": {"steps": 1}}
    with pytest.raises(ValidationError, match=r"loss\.top_k does not go with teacher\.scores"):
        trained({"top_k": 5}, online={}, **scores)
