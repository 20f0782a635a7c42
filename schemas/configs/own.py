"""Configs of code of one's own: `engine: file.py:Class` with free options (schemas/own_code.py).

Each role's union of engines has one: `named_or_own` decides by the colon in the tag.
"""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import Discriminator, Field

from .. import own_code
from .base import Config, added, operational

NAMED, OWN = "", "own"  # tags of the two branches; an error's path omits the empty one

OwnName = Annotated[str, Field(pattern=":")]
OPTIONS: Any = Field(
    default={}, description="Options of the class, or keyword arguments of the function."
)
SHA256 = operational(
    None, "SHA-256 of the file; another content is refused. A run sets it for its workers."
)


def named_or_own(tag: str) -> Discriminator:
    """Tells an engine of the toolkit from code of one's own; tag: `engine` or `kind`."""

    def branch(value: Any) -> str:
        name = value.get(tag) if isinstance(value, dict) else getattr(value, tag, None)
        return OWN if own_code.is_own(name) else NAMED

    return Discriminator(branch)


class OwnConfig(Config):
    """What all configs of code of one's own share. Their identity holds the file's hash."""

    @property
    def code_name(self) -> str:
        return getattr(self, self._tag())

    def load(self, where: str) -> own_code.OwnCode:
        """The class or function; raises InputError as `own_code.load`."""
        return own_code.load(self.code_name, where, getattr(self, "sha256", None))

    def semantic(self) -> dict[str, Any]:
        """Raises InputError if there is no such code."""
        code = self.load(self._where())
        return super().semantic() | {
            self._tag(): own_code.short_name(code.name),
            "source": code.sha256,
        }

    def located(self) -> "OwnConfig":
        code = self.load(self._where())
        name = own_code.absolute_name(self.code_name)
        return self.model_copy(update={self._tag(): name, "sha256": code.sha256})

    def _where(self) -> str:
        """The config's field, for errors."""
        return self._tag()

    def _tag(self) -> str:
        return next(tag for tag in ("kind", "engine", "name") if tag in type(self).model_fields)


class OwnSampler(OwnConfig):
    engine: OwnName = Field(description="file.py:Class or module:Class of your own.")
    options: dict[str, Any] = OPTIONS
    sha256: str | None = SHA256


class OwnAnnotator(OwnConfig):
    engine: OwnName = Field(description="file.py:Class or module:Class of your own.")
    name: str | None = Field(
        default=None, description="Name recorded with each annotation; null: the class's."
    )
    reflection: bool = added(
        False, "Keep the reflections of the class's readings; false: it must return none."
    )
    options: dict[str, Any] = OPTIONS
    sha256: str | None = SHA256


class OwnSource(OwnConfig):
    kind: OwnName = Field(description="file.py:Class or module:Class of your own.")
    options: dict[str, Any] = OPTIONS
    sha256: str | None = SHA256


class OwnReward(OwnConfig):
    engine: OwnName = Field(description="file.py:function or file.py:Class of your own.")
    options: dict[str, Any] = OPTIONS
    sha256: str | None = SHA256


C = TypeVar("C", bound=Config)


def located(config: C) -> C:
    """The config with absolute files and the hashes of all code of one's own in it.

    Workers in other folders load the same files, and refuse them once they have changed.
    """
    return _mapped(config, lambda own: own.located())


def own_sources(config: Config) -> list[dict[str, Any]]:
    """The identity of all code of one's own in a config; empty without any."""
    found: list[dict[str, Any]] = []

    def note(own: OwnConfig) -> OwnConfig:
        found.append(own.semantic())
        return own

    _mapped(config, note)
    return found


def _mapped(config: C, change: Callable[[OwnConfig], Any]) -> C:
    if isinstance(config, OwnConfig):
        return change(config)
    nested: dict[str, Any] = {name: one for name, one in config if isinstance(one, Config)}
    changes: dict[str, Any] = {name: _mapped(value, change) for name, value in nested.items()}
    for name, value in config:
        if isinstance(value, list) and any(isinstance(one, OwnConfig) for one in value):
            nested[name] = value
            changes[name] = [
                _mapped(one, change) if isinstance(one, Config) else one for one in value
            ]
    if all(changes[name] is value for name, value in nested.items()):
        return config
    return config.model_copy(update=changes)
