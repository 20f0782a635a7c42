"""The HTML page that `report` writes and `view` serves: markup, style and script of web/ in one.

The page loads nothing but, where it is served, its own server's data; by its content security
policy it runs no script but its own, whatever a response contains.
"""

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from .paint import Paint
from .rollout_index import RolloutIndex
from .side_by_side import Agreement

_HERE = Path(__file__).parent / "web"
_STYLES = ("page.css", "rollouts.css", "print.css")
_SCRIPTS = ("page.js", "sources.js", "list.js", "rollout.js", "curves.js", "start.js")
STYLE, SCRIPT = (
    "\n".join((_HERE / name).read_text(encoding="utf-8") for name in names)
    for names in (_STYLES, _SCRIPTS)
)


def page_template(file: Path) -> Template:
    """A page's markup; whatever is put into it is escaped, and what is missing is an error."""
    environment = Environment(
        loader=FileSystemLoader(file.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(file.name)


def render_page(data: dict[str, Any], served: bool, **context: Any) -> str:
    """The page as HTML.

    data: what the page's script reads, see `page_data`; context: what the markup shows besides.
    """
    return page_template(_HERE / "page.html.j2").render(
        data=data,
        served=served,
        style=Markup(STYLE),  # noqa: S704 - our own file
        script=Markup(SCRIPT),  # noqa: S704 - our own files
        content_security_policy=content_security_policy(served),
        **context,
    )


def page_data(index: RolloutIndex, labels: tuple[str, str] | None) -> dict[str, Any]:
    """What the page's script needs of any dataset, as JSON-able data.

    labels: what two compared annotators are called.
    """
    return {
        "total": len(index),
        "facets": [
            {"name": facet.name, "label": facet.label, "values": facet.counts()}
            for facet in index.facets
        ],
        "labels": labels,
        "paints": paint_names(Paint),
        "agreements": [agreement.name.lower() for agreement in Agreement],
    }


def paint_names(paints: Iterable[Paint]) -> list[str]:
    """The names under which style and script know them, in their own order."""
    return [paint.name.lower() for paint in sorted(paints)]


def content_security_policy(served: bool) -> str:
    """Nothing but the page's own style and script; where it is served, its server's data."""
    return "; ".join(
        [
            "default-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            f"script-src {csp_hash(SCRIPT)}",
            f"style-src {csp_hash(STYLE)}",
            *(["connect-src 'self'"] if served else []),
        ]
    )


def csp_hash(content: str) -> str:
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"
