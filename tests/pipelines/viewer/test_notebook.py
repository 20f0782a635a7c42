"""One rollout as a notebook draws it: the viewer's paint, no script, every text escaped."""

import re
from html import unescape

import pytest

import trace_opd as to
from trace_opd.pipelines.terminal import visible
from trace_opd.pipelines.viewer.notebook import RolloutPicture
from trace_opd.pipelines.viewer.paint import Paint
from trace_opd.tests.pipelines.viewer.test_report import HOSTILE, Run, byte_tokenizer, make_run

LISTS = ("dl", "dt", "dd", "ol", "li")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    responses = [["plain\nstep\n7\n", f"{text}step\n8\n"] for text in HOSTILE]
    return make_run(tmp_path_factory.mktemp("run"), byte_tokenizer(), responses)


@pytest.fixture(scope="module")
def pictures(run) -> list[RolloutPicture]:
    return [to.show(run.routed, row) for row in range(2 * len(HOSTILE))]


def drawn(page: str) -> list[tuple[str, str]]:
    """(class, text) of each piece of the response."""
    (response,) = re.findall(r'<pre class="response">(.*?)</pre>', page, re.DOTALL)
    found = re.findall(
        r'<span(?: class="([\w-]+)" title="[^"]*")?>(.*?)</span>', response, re.DOTALL
    )
    return [(name, unescape(text)) for name, text in found]


def test_the_pieces_are_the_viewers(pictures):
    paints = set()
    for picture in pictures:
        pieces = picture.view.pieces
        assert [text for _, text in drawn(picture._repr_html_())] == [one.text for one in pieces]
        for (name, _), piece in zip(drawn(picture._repr_html_()), pieces, strict=True):
            plain = piece.paint is Paint.PLAIN and piece.span < 0
            assert name == ("" if plain else f"p-{piece.paint.name.lower()}")
            paints.add(piece.paint)
    assert len(paints) > 1


def test_hostile_texts_are_never_markup(pictures):
    texts = set()
    for picture in pictures:
        page = picture._repr_html_()
        assert not re.search(r"<script|<img|\x1b|\u202e", page, re.IGNORECASE)
        tags = {tag for tag, _ in re.findall(r"<(\w+)([^>]*)>", page)}
        assert tags <= {*("div", "style", "h3", "p", "b", "pre", "i", "span", "aside"), *LISTS}
        assert not re.search(r"<[^>]*(?:src|href)=|@import|url\(", page)
        texts.add("".join(text for _, text in drawn(page)))
    assert {visible(f"{text}step\n8\n") for text in HOSTILE} <= texts


def test_spans_facts_and_the_id_are_there(pictures):
    view = pictures[0].view
    text = " ".join(
        unescape(re.sub(r"(?s)<style>.*?</style>|<.*?>", " ", pictures[0]._repr_html_())).split()
    )
    for span in view.spans:
        assert f"{span.rank} {span.kind}, segment {span.segments[0]}" in text
    assert view.id in text
    assert f"{view.advantage:+.3f}" in text
    assert repr(pictures[0]).startswith(f"RolloutPicture({view.id} in convert/")


def test_a_dataset_without_routes_shows_marks(run):
    page = to.show(run.annotations, 0)._repr_html_()
    assert "p-marked" in {name for name, _ in drawn(page)}


def test_a_browser_paints_it_and_leaves_the_notebook_alone(browser, pictures, tmp_path):
    page = tmp_path / "cell.html"
    outside = '<h3 class="problem">notebook</h3><pre class="response">cell</pre>'
    page.write_text(f"<meta charset=utf-8>{outside}<div>{pictures[0]._repr_html_()}</div>{outside}")
    browser.open(page.as_uri(), ".trace-opd .response")
    style = "getComputedStyle(document.querySelector('{}')).{}"
    assert browser.js(style.format("body > pre.response", "padding")) == "0px"
    assert browser.js(style.format(".trace-opd .response", "padding")) == "12px 16px 14px"
    (painted,) = {name for name, _ in drawn(pictures[0]._repr_html_()) if name} & {"p-fkl", "p-rkl"}
    colour = browser.js(style.format(f".trace-opd .{painted}", "backgroundColor"))
    assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)", colour), colour
    assert not browser.too_wide(900)
