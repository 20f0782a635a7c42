"""The HTML page that report_page.py writes and view.py serves: markup, style and script of web/ in
one. notebook.py uses its styles.

The page loads nothing except, when it is served, its own server's data. Its content security policy
allows no script but its own, whatever a response contains. compare/page.py uses the template
loader and the hashes too.
"""

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from ...schemas.labels import Route
from .paint import Paint
from .rollout_index import RolloutIndex
from .side_by_side import Agreement

_HERE = Path(__file__).parent / "web"
_STYLES = ("colours.css", "page.css", "rollouts.css", "routes.css.j2", "print.css")
_SCRIPTS = ("page.js", "sources.js", "list.js", "rollout.js", "curves.js", "start.js")
ROUTES = [route.name.lower() for route in Route if route is not Route.GRPO]


def page_template(file: Path) -> Template:
    """A template that escapes every value and raises an error for a missing one."""
    environment = Environment(
        loader=FileSystemLoader(file.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(file.name)


_TITLES = {"annotations": "Annotated rollouts", "routed": "Routed rollouts", "verdicts": "Verdicts"}
_TITLES_OF_STAGES = {"train": "Train run", "select": "Selection", "score": "Teacher's scores"}


def stylesheet(names: Iterable[str]) -> str:
    """Stylesheets of web/ as one."""
    return "\n".join(page_template(_HERE / name).render(routes=ROUTES) for name in names)


STYLE = stylesheet(_STYLES)
SCRIPT = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS)


def render_page(data: dict[str, Any], served: bool, **context: Any) -> str:
    """The page as HTML.

    data: what the page's script reads, see `page_data`; context: the template's other variables.
    """
    dataset = context["dataset"]
    table = _TITLES.get(dataset.manifest["table"], "Rollouts")
    return page_template(_HERE / "page.html.j2").render(
        data=data,
        title=_TITLES_OF_STAGES.get(dataset.stage, table),
        served=served,
        style=Markup(STYLE),  # noqa: S704 - our own file
        script=Markup(SCRIPT),  # noqa: S704 - our own files
        content_security_policy=content_security_policy(served),
        **context,
    )


def page_data(
    index: RolloutIndex, labels: tuple[str, str] | None, rollouts: int | None = None
) -> dict[str, Any]:
    """What the page's script needs for any dataset, as JSON-able data.

    labels: the names of two compared annotators. rollouts: of the dataset; None: the index has all.
    """
    return {
        "total": len(index),
        "all": len(index) if rollouts is None else rollouts,
        "facets": [
            {"name": facet.name, "label": facet.label, "values": facet.counts()}
            for facet in index.facets
        ],
        "labels": labels,
        "paints": paint_names(Paint),
        "routes": ROUTES,
        "agreements": [agreement.name.lower() for agreement in Agreement],
    }


def paint_names(paints: Iterable[Paint]) -> list[str]:
    """The names that style and script use, in the order of the paints."""
    return [paint.name.lower() for paint in sorted(paints)]


def content_security_policy(served: bool) -> str:
    """Allows the page's own style and script, and when it is served, its server's data."""
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
