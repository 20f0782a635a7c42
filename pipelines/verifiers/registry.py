"""Which verifier a config names. Stages, online training and evaluations call this."""

from ...schemas.configs import LengthPart, OwnReward, VerifyConfig
from ...trace.protocols import Verifier


def open_verifier(config: VerifyConfig) -> Verifier:
    """The verifier of a config; it holds worker processes until it is closed.

    Raises:
        InputError: no such function of one's own, or a part of the rewards can't run here.
    """
    if config.rewards:
        from .parts import PartsVerifier

        return PartsVerifier(config)
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
    if config.rewards:
        from .rewards import part_identity

        return [part_identity(part) for part in config.rewards]
    if isinstance(config.reward, OwnReward):
        from .own import own_identity

        return [own_identity(config.reward)]
    from .verdicts import CHOICE_MATCHER, math_matcher

    return [math_matcher(), CHOICE_MATCHER]


def judged_columns(config: VerifyConfig) -> list[str]:
    """The columns of rollouts that the verifier of a config reads."""
    from .verdicts import JUDGED_COLUMNS

    tokens = any(isinstance(part, LengthPart) and part.unit == "tokens" for part in config.rewards)
    return [*JUDGED_COLUMNS, "token_ids"] if tokens else JUDGED_COLUMNS
