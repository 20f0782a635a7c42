"""Safe YAML: settings.py and the prompt and price files load untrusted text with it, under
limits.
"""

from typing import Any

import yaml

# A config of every stage with all its fields has a few hundred.
_MOST_NODES, _MOST_DEPTH, _MOST_CHARS = 20_000, 64, 4 << 20
_MOST_NUMBER_CHARS = 100
_NOT_TEXT = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}
_MERGE = "tag:yaml.org,2002:merge"


def load_yaml(text: str) -> Any:
    """The value of a YAML text, made of mappings, lists and JSON's scalars.

    No object is shared: YAML's aliases would load as one object, and an override of one path would
    change the other.

    Raises:
        YAMLError: invalid YAML, or YAML beyond the limits.
    """
    try:
        return _Unshared().copy(_Loader(text).get_single_data())
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
    except ValueError as error:  # an invalid date, or a number of thousands of digits
        raise yaml.YAMLError(str(error)) from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that stops at the first limit exceeded and refuses repeated keys."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._nodes += 1
        self._depth += 1
        if self._nodes > _MOST_NODES:
            raise yaml.YAMLError(f"it holds more than {_MOST_NODES:,} values")
        if self._depth > _MOST_DEPTH:
            raise yaml.YAMLError("it is nested too deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        # 1:1:1:… is a number in base 60, and parsing it takes quadratic time.
        if node.tag in _NOT_TEXT and len(node.value) > _MOST_NUMBER_CHARS:
            raise yaml.YAMLError(f"it holds a number of {len(node.value):,} characters")
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"line {line}: key {key.value[:80]!r} appears twice")
                seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: Any) -> None:
        """Expand merge keys (`<<: *other`), each of which may double the content."""
        merged = 0
        for key, value in node.value:
            if key.tag == _MERGE:
                for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(one, yaml.MappingNode):
                        self.flatten_mapping(one)
                        merged += len(one.value)
                    if merged > _MOST_NODES:
                        raise yaml.YAMLError(f"it holds more than {_MOST_NODES:,} values")
        super().flatten_mapping(node)


class _Unshared:
    """Copies a loaded value so that it shares no object, and counts its nodes and characters."""

    def __init__(self) -> None:
        self._nodes = self._chars = 0

    def copy(self, value: Any, around: tuple[int, ...] = ()) -> Any:
        self._nodes += 1
        if self._nodes > _MOST_NODES:  # aliases of aliases double with every line
            raise yaml.YAMLError(f"it holds more than {_MOST_NODES:,} values")
        if isinstance(value, int) and value.bit_length() > 63:
            raise yaml.YAMLError("it holds a number of more than 64 bits")
        if isinstance(value, bytes | set | tuple):
            raise yaml.YAMLError(f"it holds a value of the type {type(value).__name__}")
        if isinstance(value, str):
            self._chars += len(value)
            if self._chars > _MOST_CHARS:  # aliases of a long text
                raise yaml.YAMLError(f"it holds more than {_MOST_CHARS:,} characters")
        if not isinstance(value, dict | list):
            return value
        if id(value) in around:
            raise yaml.YAMLError("an alias is inside its own anchor")
        around += (id(value),)
        if isinstance(value, dict):
            return {self.copy(key): self.copy(child, around) for key, child in value.items()}
        return [self.copy(child, around) for child in value]
