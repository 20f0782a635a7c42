"""Invisible characters written out: the terminal, the viewer and error messages show no others."""

import re

# Controls except newline and tab, characters that show nothing or change the reading direction
# (soft hyphen, fillers, zero-width and bidirectional marks, separators, interlinear marks, tags and
# supplementary variation selectors), and lone surrogates, which no encoding can write.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff9-\ufffb"
    "\U000e0000-\U000e0fff]"
)


def visible(text: str) -> str:
    """The text with control, invisible and direction-changing characters written out.

    C0 controls become their control pictures (␛ for escape), others their code point (⟨U+202E⟩).
    """
    return INVISIBLE.sub(_written_out, text)


def _written_out(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"
