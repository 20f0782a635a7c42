"""The base class of all configs in this folder.

Fields marked `operational` change how a stage runs, never its result, so dataset ids omit them.
Fields marked `added` are newer than datasets that exist: their default leaves ids as they were.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Base of all configs: unknown keys are errors, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def semantic(self) -> dict[str, Any]:
        """The config as JSON data without operational fields, which a dataset id hashes."""
        out: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("operational"):
                continue
            value = getattr(self, name)
            if isinstance(extra, dict) and extra.get("added") and value == field.default:
                continue
            if isinstance(value, Config):
                out[name] = value.semantic()
            else:
                out[name] = self.model_dump(mode="json", include={name})[name]
        return out


def operational(default: Any, description: str, **limits: Any) -> Any:
    """A field that changes how a stage runs, never its result."""
    return Field(
        default=default, description=description, json_schema_extra={"operational": True}, **limits
    )


def added(default: Any, description: str, **limits: Any) -> Any:
    """A field that dataset ids omit at its default, as before there was such a field."""
    return Field(
        default=default, description=description, json_schema_extra={"added": True}, **limits
    )
