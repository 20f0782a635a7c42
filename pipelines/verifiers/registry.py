"""Which verifier a config names. Stages, online training and evaluations call this."""

from ...schemas.configs import OwnReward, VerifyConfig
from ...trace.protocols import Verifier


def open_verifier(config: VerifyConfig) -> Verifier:
    """The verifier of a config; it holds worker processes until it is closed.

    Raises:
        InputError: no such function of one's own.
    """
    if isinstance(config.reward, OwnReward):
        from .own import OwnRewards

        return OwnRewards(config, config.reward)
    from .verdicts import MathVerifier

    return MathVerifier(config)


def verifier_identity(config: VerifyConfig) -> list[str]:
    """Names and versions of what judges, for dataset ids.

    Raises:
        InputError: no such function of one's own.
    """
    if isinstance(config.reward, OwnReward):
        from .own import reward_identity

        return [reward_identity(config.reward)]
    from .verdicts import CHOICE_MATCHER, math_matcher

    return [math_matcher(), CHOICE_MATCHER]
