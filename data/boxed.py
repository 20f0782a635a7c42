"""The final answer in a `\\boxed{}`, in solutions and responses of mathematics problems.

The presets of source `hub` and the verifier call this.
"""

import re

# An escaped character ("\{", "\\") is one token, so it neither opens a box nor counts as a brace.
_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_VISIBLE = re.compile(r"\S")


def last_boxed(response: str) -> str | None:
    """Content of the last balanced, non-empty `\\boxed{…}`; the outer one if they are nested.

    An unclosed box hides neither an earlier box nor one inside it.
    """
    found = None
    stack: list[int | None] = []  # where a box's content starts; None for other braces
    for match in _BRACES.finditer(response):
        if match["box"]:
            stack.append(match.end())
        elif match["open"]:
            stack.append(None)
        elif match["close"] and stack:
            start = stack.pop()
            # Slice once, after the scan: slicing here would be quadratic for deeply nested boxes.
            if start is not None and _VISIBLE.search(response, start, match.start()):
                found = (start, match.start())
    return response[slice(*found)].strip() if found else None
