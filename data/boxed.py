"""The final answer in a box, as solutions and responses of mathematics problems write it."""

import re

# An escaped character ("\{", "\\") is one token, so it neither opens a box nor counts as a brace.
_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_VISIBLE = re.compile(r"\S")


def last_boxed(response: str) -> str | None:
    """Content of the last balanced, non-empty `\\boxed{…}`; of nested boxes the outer one.

    A box that never closes hides neither an earlier one nor one inside it.
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
            # The content is cut out once, after the scan: cutting here would be quadratic for
            # deeply nested boxes.
            if start is not None and _VISIBLE.search(response, start, match.start()):
                found = (start, match.start())
    return response[slice(*found)].strip() if found else None
