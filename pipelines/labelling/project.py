"""The labelling interface: Label Studio's config, and the names by which tasks and results agree.

export_tasks.py writes the config, read_export.py knows the names.
"""

from collections.abc import Iterable
from xml.sax.saxutils import quoteattr

from ...schemas.labels import WORDS, DiagnosticType, ErrorType, SpanKind, TypeLabel
from .shown import SEGMENT_CLASS

# Names of the tags that people fill in, in a result's from_name, and of what they mark.
MARKS, TYPE, RESPONSE = "marks", "type", "response_html"
LABELS = "labels"  # the type of a mark's result, and the key of its labels
# Fields of a task's data that are shown, in this order, before the response.
FIELDS = ("history", "problem", "reference", "verdict")
_COLOURS = {SpanKind.ERROR: "#d62728", SpanKind.KEY: "#1f77b4"}
_GROUPS: dict[str, Iterable[TypeLabel]] = {
    "Mistake in a wrong response": ErrorType,
    "Key step of a right response": DiagnosticType,
}
_STYLE = f"""\
    .{SEGMENT_CLASS} {{ white-space: pre-wrap; }}
    .{SEGMENT_CLASS}:nth-child(even) {{ background: rgba(128, 128, 128, 0.14); }}
"""
_HEADERS: dict[str, str] = dict(
    zip(FIELDS, ("Earlier turns", "Problem", "Reference", "Verdict"), strict=True)
)


def config_xml(fields: Iterable[str]) -> str:
    """Label Studio's config. fields: those of FIELDS that every task's data has.

    Label Studio refuses tasks that lack a field of the config.
    """
    lines = ["<View>", "  <Style>", _STYLE.rstrip("\n"), "  </Style>"]
    for name in fields:
        lines.append(f"  <Header value={quoteattr(_HEADERS[name])}/>")
        lines.append(f'  <Text name="{name}" value="${name}"/>')
    lines.append('  <Header value="Response (each shade is a segment)"/>')
    lines.append(f'  <Labels name="{MARKS}" toName="{RESPONSE}">')
    for kind, colour in _COLOURS.items():
        lines.append(f'    <Label value="{kind}" background="{colour}"/>')
    lines.append("  </Labels>")
    lines.append(f'  <HyperText name="{RESPONSE}" value="${RESPONSE}" inline="true"/>')
    lines.append(f'  <Choices name="{TYPE}" toName="{RESPONSE}" choice="single" showInline="true">')
    for header, labels in _GROUPS.items():
        lines.append(f"    <Header value={quoteattr(header)}/>")
        lines += [
            f'    <Choice value="{label}" hint={quoteattr(WORDS[label])}/>' for label in labels
        ]
    lines += ["  </Choices>", "</View>", ""]
    return "\n".join(lines)
