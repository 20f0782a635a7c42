"""The parts of `verify.rewards`: which file implements which name.

registry.py calls `open_part` and `part_identity`. A part is added by a config in
schemas/configs/rewards.py, a file here with `identity(part)` and a class of part.py's protocol, and
a line in `_FILES`. A file is imported when its part is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ....schemas.configs import JudgePart, VerifyConfig
from ....schemas.configs import Part as PartConfig
from ....schemas.own_code import is_own
from .part import Part

if TYPE_CHECKING:  # verdicts without judges start without the client of endpoints
    from ...paid.keeping import Kept

# Name in the config: file, class.
_FILES = {
    "answer": ("answer", "Answer"),
    "math": ("answer", "Answer"),
    "choice": ("answer", "Answer"),
    "exact": ("exact", "Exact"),
    "regex": ("regex", "Regex"),
    "format": ("format", "Format"),
    "length": ("length", "Length"),
    "gym": ("gym", "Gym"),
    "code": ("code", "Code"),
    "judge": ("judge", "Judge"),
}
_OWN = ("own", "Own")


def open_part(
    part: PartConfig, config: VerifyConfig, label: str, kept: "Kept | None" = None
) -> Part:
    """The part; it may hold processes until it is closed.

    label: its name in table verdicts; kept: where a judge keeps its answers.

    Raises:
        InputError: it can't run here.
    """
    file, name = _named(part)
    kind = getattr(import_module(f".{file}", __package__), name)
    if isinstance(part, JudgePart):
        return kind(part, config, label, kept)
    return kind(part, config)


def part_identity(part: PartConfig) -> str:
    """Name and version of what judges, for dataset ids and table verdicts.

    Raises:
        InputError: no such function of one's own.
    """
    return import_module(f".{_named(part)[0]}", __package__).identity(part)


def _named(part: PartConfig) -> tuple[str, str]:
    return _OWN if is_own(part.name) else _FILES[part.name]
