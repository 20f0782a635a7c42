"""Which verifier a config names. Stages, online training and evaluations call this."""

from typing import TYPE_CHECKING, Any

from ...data.store import Draft
from ...schemas.configs import LengthPart, OwnReward, VerifyConfig
from ...trace.protocols import Verifier

if TYPE_CHECKING:  # verdicts without judges start without the client of endpoints
    from ..paid.keeping import Kept


def open_verifier(config: VerifyConfig, kept: "Kept | None" = None) -> Verifier:
    """The verifier of a config; it holds worker processes until it is closed.

    kept: where judges keep their answers; None: nowhere, so that they are paid for again.

    Raises:
        InputError: no such function of one's own, or a part of the rewards can't run here.
    """
    if config.rewards:
        from .parts import PartsVerifier

        return PartsVerifier(config, kept)
    if isinstance(config.reward, OwnReward):
        from .own import OwnRewards

        return OwnRewards(config, config.reward)
    from .verdicts import MathVerifier

    return MathVerifier(config)


def keep_answers(config: VerifyConfig, draft: Draft, rows: int | None = None) -> "Kept | None":
    """Where a dataset's judges keep their answers; None without judges. rows: of the dataset.

    Raises:
        InputError: the store is remote and has no local folder.
    """
    if not config.judges:
        return None
    from ..paid.keeping import kept_with

    return kept_with(draft, rows)


def judges_bills(config: VerifyConfig, draft: Draft) -> dict[str, Any]:
    """For a dataset's summary: what its judges' requests have cost; {} without judges."""
    if not config.judges:
        return {}
    from ..paid.keeping import bills

    return bills(config.judges, draft)


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
