"""The report and `show`: what is drawn, in which paint, and that hostile text stays text."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.style import Style
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trace_opd.data.store import Dataset, Store, content_hash
from trace_opd.pipelines.cli.show import response_text, show_rollout
from trace_opd.pipelines.terminal import visible
from trace_opd.pipelines.viewer import report_page
from trace_opd.pipelines.viewer.page import csp_hash
from trace_opd.pipelines.viewer.paint import (
    Paint,
    Piece,
    paint_even_tokens,
    paint_kept_spans,
    paint_spans,
    paint_tokens,
    pieces,
)
from trace_opd.pipelines.viewer.rollout_tables import choose_groups, policy_vocabulary
from trace_opd.pipelines.viewer.training_curves import charts
from trace_opd.schemas.configs import ReportConfig, RoutingConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import Route, SpanKind
from trace_opd.schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.schemas.tables import ROUTED as ROUTED_TABLE
from trace_opd.trace.align import ByteTable, byte_table
from trace_opd.trace.policy import vocab_fingerprint
from trace_opd.trace.route import Routing, route_tokens
from trace_opd.trace.routed import routed_table
from trace_opd.trace.rule_inputs import Response
from trace_opd.trace.segment import segment

PWNED = "document.title='pwned'"
HOSTILE = (
    f"<script>{PWNED}</script>\n",
    f'</script><script>{PWNED}</script><img src=x onerror="{PWNED}">\n',
    "<!--<script>\n",
    "turned \u202eright to left\n",
    "\x1b[31mred\x1b]0;pwned\x07\n",
)
TOKENIZER_CODE = """from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({sprung!r}).touch()
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@dataclass(frozen=True)
class Run:
    store: Store
    problems: Dataset
    annotations: Dataset
    routed: Dataset


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end token that stands for none."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def table(tokenizer) -> ByteTable:
    return byte_table(tokenizer)


def make_run(
    root: Path,
    tokenizer,
    responses: list[list[str]],
    with_policy: bool = True,
    with_code: bool = False,
    **routing: Any,
) -> Run:
    """A store whose problem i has the given responses: first correct, others wrong, the first two
    segments of each marked. with_code: the tokenizer's class comes with the policy, which the
    config trusts. routing: fields of RoutingConfig."""
    policy = root / "policy"
    if with_policy:
        tokenizer.save_pretrained(policy)
        (policy / "config.json").write_text("{}")
    if with_code:
        code = TOKENIZER_CODE.format(sprung=str(root / "sprung"))
        (policy / "own_tokenizer.py").write_text(code)
        settings = json.loads((policy / "tokenizer_config.json").read_text())
        classes = {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}
        settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": classes}
        (policy / "tokenizer_config.json").write_text(json.dumps(settings))
    store = Store(root / "store")
    problems, rollouts, verdicts, annotations = [], [], [], []
    for index, texts in enumerate(responses):
        problem = f"What is {index}+1? <b>bold</b>"
        problem_id = content_hash(problem)
        problems.append(
            {
                "problem_id": problem_id,
                "problem": problem,
                "answer": str(index + 1),
                "answer_kind": "math",
                "source": "made up",
                "split": "train",
            }
        )
        for sample, text in enumerate(texts):
            correct = sample == 0
            ids = {
                "rollout_id": content_hash([index, sample]),
                "problem_id": problem_id,
                "group_id": content_hash([index]),
            }
            token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            token_ids.append(tokenizer.eos_token_id)
            rollouts.append(ids | rollout_row(sample, text, token_ids, tokenizer))
            verdicts.append(
                ids
                | {
                    "reward": float(correct),
                    "correct": correct,
                    "parsed_answer": text[:3],
                    "status": "ok",
                    "verifier": "by hand",
                    "seconds": 0.0,
                }
            )
            annotations.append(ids | annotation_row(text, correct))
    tables = {
        "problems": PROBLEMS.table(problems),
        "rollouts": ROLLOUTS.table(rollouts),
        "verdicts": VERDICTS.table(verdicts),
        "annotations": ANNOTATIONS.table(annotations),
    }
    config = {"policy": {"path": str(policy), "trust_remote_code": with_code}}

    def write(stage, contract, rows, inputs, settings) -> Dataset:
        draft = store.begin(stage, {}, inputs, contract, settings)
        draft.write_part(0, rows)
        return draft.finish(1)

    made = write("problems", PROBLEMS, tables["problems"], {}, {})
    sampled = write("rollout", ROLLOUTS, tables["rollouts"], {"problems": made}, config)
    judged = write("verify", VERDICTS, tables["verdicts"], {"rollouts": sampled}, {})
    marked = write("annotate", ANNOTATIONS, tables["annotations"], {"verdicts": judged}, {})
    chosen = RoutingConfig(**{"error": "rkl"} | routing)
    rows = routed_table(*tables.values(), byte_table(tokenizer), chosen)
    settings = config | {"routing": chosen.model_dump(mode="json")}
    routed = write("convert", ROUTED_TABLE, rows, {"annotations": marked}, settings)
    return Run(store, made, marked, routed)


def rollout_row(sample: int, text: str, token_ids: list[int], tokenizer) -> dict:
    return {
        "sample_index": sample,
        "prompt_token_ids": [0],
        "token_ids": token_ids,
        "logprobs": [-0.5] * len(token_ids),
        "response": text,
        "finish_reason": "stop",
        "policy_name": "bytes",
        "policy_revision": "r",
        "policy_step": 0,
        "vocab_fingerprint": vocab_fingerprint(tokenizer),
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 100,
        "seed": sample,
        "on_policy": True,
    }


def annotation_row(text: str, correct: bool) -> dict:
    bounds = segment(text)
    return {
        "correct": correct,
        "segments": [{"start": start, "end": end} for start, end in bounds],
        "spans": [
            span(rank, [rank], bounds, "key" if correct else "error")
            | {"text": text[slice(*bounds[rank])]}
            for rank in range(min(2, len(bounds)))
        ],
        "diagnostic_type": "arithmetic" if correct else "counting",
        "status": "ok",
        "annotator_name": "hand",
        "annotator_model": "hand",
        "prompt_version": "",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "cost_usd": None,
        "latency_s": 0.0,
    }


def span(rank: int, segments: list[int], bounds: list[tuple[int, int]], kind: str = "key") -> dict:
    start, end = bounds[segments[0]][0], bounds[segments[-1]][1]
    return {"segments": segments, "kind": kind, "rank": rank, "start": start, "end": end}


def page_data(page: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(found)


def as_dicts(bounds: list[tuple[int, int]]) -> list[dict]:
    return [{"start": start, "end": end} for start, end in bounds]


# --- paint ---------------------------------------------------------------------------------------


def routed(table: ByteTable, ids: list[int], bounds, spans, config: RoutingConfig) -> Routing:
    """A correct response's tokens by the config's rule."""
    response = Response(
        rollout_id="r",
        token_ids=np.array(ids),
        logprobs=np.zeros(len(ids)),
        token_segment=table.token_segments(ids, bounds),
        spans=[s["segments"] for s in spans],
        kind=SpanKind.KEY,
        alpha=config.alpha,
    )
    return route_tokens(response, config)


def test_tokens_have_the_paint_of_their_route(tokenizer, table):
    text = "é=1\nab\nc\nd"  # 11 bytes, hence tokens; é has two of them
    bounds = [(0, 4), (4, 7), (7, 9), (9, 10)]
    spans = [span(0, [1], bounds), span(1, [2], bounds), span(2, [0], bounds)]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Cap 5: segment 1 (3 tokens) and 2 (2 tokens) fit, segment 0 does not.
    routing = routed(table, ids, bounds, spans, RoutingConfig(alpha=0.5))
    painted = paint_tokens(
        table, len(text), as_dicts(bounds), spans, ids, routing.route, routing.span_id
    )
    drawn = pieces(text, as_dicts(bounds), painted)
    assert [tuple(piece) for piece in drawn] == [
        ("é=1\n", Paint.DROPPED, 2, 0),
        ("ab\n", Paint.FKL, 0, 1),
        ("c\n", Paint.FKL, 1, 2),
        ("d", Paint.PLAIN, -1, 3),
    ]


def test_a_route_has_the_number_of_its_paint():
    assert {paint.name: int(paint) for paint in Paint if paint in set(Route)} == {
        "PLAIN": Route.GRPO,
        "FKL": Route.FKL,
        "RKL": Route.RKL,
        "JSD": Route.JSD,
        "REWEIGHT": Route.REWEIGHT,
    }


@pytest.mark.parametrize(
    ("rule", "action", "drawn"),
    [
        # One token a character, the first two marked, the cap lets 4 of 8 through.
        ("spans", "jsd", [("ab", Paint.JSD, 0), ("cdefgh", Paint.PLAIN, -1)]),
        ("all", "reweight", [("ab", Paint.REWEIGHT, 0), ("cdefgh", Paint.REWEIGHT, -1)]),
        ("all", "none", [("ab", Paint.MARKED, 0), ("cdefgh", Paint.PLAIN, -1)]),
    ],
)
def test_routed_tokens_have_the_paint_of_their_route_outside_spans_too(
    tokenizer, table, rule, action, drawn
):
    bounds = [(0, 2), (2, 8)]
    spans = [span(0, [0], bounds)]
    ids = tokenizer("abcdefgh", add_special_tokens=False)["input_ids"]
    routing = routed(table, ids, bounds, spans, RoutingConfig(rule=rule, key=action, alpha=0.5))
    segments = as_dicts(bounds)
    exact = paint_tokens(table, 8, segments, spans, ids, routing.route, routing.span_id)
    # All tokens are equally long here: the estimate without the tokenizer is right too.
    estimated = paint_even_tokens(8, spans, routing.route, routing.span_id)
    for painted in (exact, estimated):
        assert [piece[:3] for piece in pieces("abcdefgh", segments, painted)] == drawn


@pytest.mark.parametrize("rule", ["random", "inverted"])
def test_drawn_tokens_and_the_marks_that_they_leave_out_differ(tokenizer, table, rule):
    text, bounds = "abcdefgh", [(0, 4), (4, 8)]
    spans = [span(0, [0], bounds)]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    routing = routed(table, ids, bounds, spans, RoutingConfig(rule=rule, alpha=0.25))
    painted = paint_tokens(table, 8, as_dicts(bounds), spans, ids, routing.route, routing.span_id)
    assert np.count_nonzero(painted.paint == Paint.FKL) == 2
    assert (painted.paint == Paint.FKL).tolist() == routing.route.astype(bool).tolist()
    others = painted.paint != Paint.FKL
    assert set(painted.paint[:4][others[:4]]) == {Paint.DROPPED}
    assert set(painted.paint[4:][others[4:]]) == {Paint.PLAIN}
    assert painted.span.tolist() == [0] * 4 + [-1] * 4


def test_routed_tokens_are_painted_where_nothing_is_annotated(tokenizer, table):
    ids = [*tokenizer("é=1", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    routing = routed(table, ids, [(0, 3)], [], RoutingConfig(rule="all"))
    painted = paint_tokens(table, 3, [], [], ids, routing.route, routing.span_id)
    assert painted.paint.tolist() == [Paint.FKL] * 3


def test_a_cut_first_span_is_painted_to_its_last_kept_token(tokenizer, table):
    text = "abcdefgh"
    spans = [span(0, [0], [(0, 8)])]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    config = RoutingConfig(alpha=0.25, key=Route.RKL)
    routing = routed(table, ids, [(0, 8)], spans, config)
    segments = as_dicts([(0, 8)])
    exact = paint_tokens(table, 8, segments, spans, ids, routing.route, routing.span_id)
    # One token a character: the estimate without the tokenizer is right too.
    estimated = paint_kept_spans(
        8, segments, spans, routing.route, routing.span_id, routing.dropped_tokens
    )
    for painted in (exact, estimated):
        assert [(p.text, p.paint) for p in pieces(text, segments, painted)] == [
            ("ab", Paint.RKL),
            ("cdefgh", Paint.DROPPED),
        ]


def test_without_tokenizer_a_later_span_is_kept_by_whole_segments():
    bounds = [(0, 10), (10, 20), (20, 31), (31, 60)]
    spans = [span(0, [0], bounds), span(1, [1, 2], bounds)]
    # 2 tokens per segment; the cap kept span 0 and the first segment of span 1.
    span_id = np.array([0, 0, 1, 1, -1, -1, -1, -1, -1, -1], dtype=np.int16)
    route = (span_id >= 0).astype(np.uint8)
    painted = paint_kept_spans(60, as_dicts(bounds), spans, route, span_id, dropped_tokens=2)
    assert (painted.paint[:20] == Paint.FKL).all()
    assert (painted.paint[20:31] == Paint.DROPPED).all()
    assert (painted.paint[31:] == Paint.PLAIN).all()


def test_where_spans_share_a_segment_the_higher_ranked_one_shows():
    bounds = [(0, 2), (2, 4)]
    painted = paint_spans(4, [span(0, [1], bounds), span(1, [0, 1], bounds)])
    assert painted.span.tolist() == [1, 1, 0, 0]
    assert (painted.paint == Paint.MARKED).all()


def test_pieces_join_to_the_response_and_number_every_segment():
    text = "One. Two.\n\nThree."
    segments = as_dicts(segment(text))
    drawn = pieces(text, segments, paint_spans(len(text), []))
    assert "".join(piece.text for piece in drawn) == text
    assert [piece.segment for piece in drawn] == [0, 1, 2]
    assert pieces("", [], paint_spans(0, [])) == []


def test_invisible_characters_are_written_out():
    assert visible("a\x1b[1m\r\x7f\x9b") == "a␛[1m␍␡⟨U+009B⟩"
    assert visible("\u202e\u200b\u2066\ufeff\u2028") == ("⟨U+202E⟩⟨U+200B⟩⟨U+2066⟩⟨U+FEFF⟩⟨U+2028⟩")
    assert visible("\tx²\n中 שלום é") == "\tx²\n中 שלום é"


# --- the page ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory, tokenizer) -> Run:
    responses = [[f"plain {i}\nstep\n7\n", f"{text}step\n8\n"] for i, text in enumerate(HOSTILE)]
    return make_run(tmp_path_factory.mktemp("report"), tokenizer, responses)


def test_hostile_texts_are_data_and_never_markup(hostile_run):
    path = report_page.run(ReportConfig(dataset=hostile_run.routed.ref), hostile_run.store)
    assert path == Path(hostile_run.routed.path("report.html"))
    page = path.read_text(encoding="utf-8")
    assert len(re.findall("<script", page, re.IGNORECASE)) == 2  # the data and our own
    assert "<img" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    texts = {
        "".join(piece[0] for piece in rollout["pieces"])
        for rollout in page_data(page)["rollouts"]
        if not rollout["correct"]
    }
    assert texts == {visible(f"{text}step\n8\n") for text in HOSTILE}


def test_page_loads_nothing_and_runs_only_its_own_script(hostile_run):
    page = report_page.run(
        ReportConfig(dataset=hostile_run.routed.ref), hostile_run.store
    ).read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page)
    assert "@import" not in page
    assert "url(" not in page
    (policy,) = map(html.unescape, re.findall(r'Content-Security-Policy" content="(.*?)"', page))
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert "default-src 'none'" in policy
    assert f"script-src {csp_hash(script)};" in policy


def test_page_paints_exactly_where_the_policy_is_at_hand(tmp_path, tokenizer):
    run = make_run(tmp_path, tokenizer, [["ab\ncd\nefghijklmnop\n"]], alpha=0.2)  # cap 4 of 20
    page = report_page.run(ReportConfig(dataset=run.routed.ref), run.store).read_text("utf-8")
    (rollout,) = page_data(page)["rollouts"]
    assert [tuple(piece) for piece in rollout["pieces"]] == [
        ("ab\n", Paint.FKL, 0, 0),
        ("cd\n", Paint.DROPPED, 1, 1),
        ("efghijklmnop\n", Paint.PLAIN, -1, 2),
    ]
    assert rollout["exact"]
    assert "tokenizer that made their token ids" not in page


@pytest.mark.parametrize("allowed", [True, False])
def test_a_tokenizers_own_code_runs_only_if_config_and_environment_allow_it(
    tmp_path, tokenizer, monkeypatch, caplog, allowed
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    if allowed:
        monkeypatch.setenv("TRACE_OPD_TRUST_REMOTE_CODE", "1")
    run = make_run(tmp_path, tokenizer, [["ab\ncd\nefghijklmnop\n"]], with_code=True)
    page = report_page.run(ReportConfig(dataset=run.routed.ref), run.store).read_text("utf-8")
    (rollout,) = page_data(page)["rollouts"]
    assert rollout["exact"] == (tmp_path / "sprung").exists() == allowed
    assert ("set TRACE_OPD_TRUST_REMOTE_CODE=1 to run it" in caplog.text) != allowed


def test_the_environment_alone_runs_no_code_of_a_tokenizer(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("TRACE_OPD_TRUST_REMOTE_CODE", "1")
    run = make_run(tmp_path, tokenizer, [["ab\ncd\n"]], with_code=True)
    policy = run.routed.manifest["config"]["policy"] | {"trust_remote_code": False}
    with pytest.raises(InputError, match="trust_remote_code"):
        policy_vocabulary(policy)
    assert not (tmp_path / "sprung").exists()


def test_page_paints_by_spans_and_says_so_where_the_policy_is_gone(tmp_path, tokenizer):
    run = make_run(tmp_path, tokenizer, [["ab\ncd\nefghijklmnop\n"]], alpha=0.2, with_policy=False)
    page = report_page.run(ReportConfig(dataset=run.routed.ref), run.store).read_text("utf-8")
    (rollout,) = page_data(page)["rollouts"]
    assert [piece[1] for piece in rollout["pieces"]] == [Paint.FKL, Paint.DROPPED, Paint.PLAIN]
    assert not rollout["exact"]
    assert "tokenizer that made their token ids" in page


def test_page_without_the_policy_is_exact_where_all_tokens_are_on_one_route(tmp_path, tokenizer):
    responses = [["ab\ncdefgh\n", "ij\nklmnop\n"]]
    baseline = {"rule": "all", "key": "jsd", "error": "reweight"}
    run = make_run(tmp_path, tokenizer, responses, with_policy=False, **baseline)
    page = report_page.run(ReportConfig(dataset=run.routed.ref), run.store).read_text("utf-8")
    right, wrong = page_data(page)["rollouts"]
    assert {piece[1] for piece in right["pieces"]} == {Paint.JSD}
    assert {piece[1] for piece in wrong["pieces"]} == {Paint.REWEIGHT}
    assert right["exact"]
    assert "tokenizer that made their token ids" not in page
    assert right["spans"][0]["kept_tokens"] is None  # span 0 of the rule is not the annotator's


def test_page_without_the_policy_estimates_where_a_rule_drew_tokens(tmp_path, tokenizer):
    run = make_run(tmp_path, tokenizer, [["ab\ncd\nefghijk\n"]], with_policy=False, rule="inverted")
    page = report_page.run(ReportConfig(dataset=run.routed.ref), run.store).read_text("utf-8")
    (rollout,) = page_data(page)["rollouts"]
    assert {piece[1] for piece in rollout["pieces"]} >= {Paint.FKL, Paint.DROPPED}
    assert not rollout["exact"]
    assert "tokenizer that made their token ids" in page


def test_page_explains_the_paints_and_counts_the_routes_that_it_holds(tmp_path, tokenizer):
    # The cap lets 3 of 14 tokens through: the first of the two marked segments.
    responses = [["ab\ncdefgh\nij\n", "kl\nmnopqr\nst\n"]]
    run = make_run(tmp_path, tokenizer, responses, key="jsd", error="none")
    page = report_page.run(ReportConfig(dataset=run.routed.ref), run.store).read_text("utf-8")
    (legend,) = re.findall('<p class="legend">(.*?)</p>', page, re.DOTALL)
    assert re.findall('class="p-(.+?)"', legend) == ["plain", "jsd", "marked", "dropped"]
    assert re.findall('<li class="(.+?)"><i>', page) == ["grpo", "jsd"]


def test_annotations_are_drawn_before_they_are_routed(hostile_run, tmp_path):
    output = tmp_path / "deep" / "page.html"
    config = ReportConfig(dataset=hostile_run.annotations.ref)
    assert report_page.run(config, hostile_run.store, output) == output
    page = output.read_text(encoding="utf-8")
    rollout = page_data(page)["rollouts"][0]
    assert {piece[1] for piece in rollout["pieces"]} == {Paint.PLAIN, Paint.MARKED}
    assert rollout["advantage"] is None
    assert "Annotated rollouts" in page


def test_an_unknown_price_is_not_zero(hostile_run):
    page = report_page.run(
        ReportConfig(dataset=hostile_run.routed.ref), hostile_run.store
    ).read_text()
    assert "<dd>unknown</dd>" in page
    assert "150 tokens, no price set" in page  # 10 rollouts of 10 + 5 tokens


def test_a_limited_page_holds_whole_groups_spread_over_the_dataset(tmp_path, tokenizer):
    run = make_run(tmp_path, tokenizer, [["a\n", "b\n"] for _ in range(10)])
    chosen = choose_groups(run.routed, limit=5)
    assert chosen == [content_hash([index, sample]) for index in (0, 5) for sample in (0, 1)]
    config = ReportConfig(dataset=run.routed.ref, limit=5)
    page = report_page.run(config, run.store).read_text("utf-8")
    assert len(page_data(page)["rollouts"]) == 4
    assert "4 of 20 rollouts are on this page" in page


def test_other_datasets_are_refused(hostile_run):
    with pytest.raises(InputError, match=r"holds problems; give a routed or an annotations"):
        report_page.run(ReportConfig(dataset=hostile_run.problems.ref), hostile_run.store)


# --- training curves -----------------------------------------------------------------------------


def finish_training(run: Run, rows: list[dict], tables: dict[str, str] | None = None) -> Dataset:
    config = run.routed.manifest["config"]
    inputs = {"routed": run.routed, "problems": run.problems}
    draft = run.store.begin("train", {"tables": tables or {}}, inputs, None, config)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (draft.local_path() / "metrics.jsonl").write_text(lines)
    return draft.finish(0, {"tables": tables} if tables else {})


def test_train_run_shows_curves_of_both_phases_and_its_rollouts(hostile_run):
    rows = [
        {"step": 0, "phase": "offline", "reward": 0.5, "pass_rate": 0.5, "kl_fkl": 0.1},
        {"step": 1, "phase": "offline", "reward": 0.6, "pass_rate": 0.6, "kl_fkl": float("nan")},
        {"step": 2, "phase": "online", "reward": 0.7, "pass_rate": 0.7, "unheard_of": 3},
    ]
    tables = {"routed": hostile_run.routed.ref, "annotations": hostile_run.annotations.ref}
    trained = finish_training(hostile_run, rows, tables)
    page = report_page.run(ReportConfig(dataset=trained.ref), hostile_run.store).read_text("utf-8")
    data = page_data(page)
    assert data["phases"] == ["offline", "offline", "online"]
    assert data["charts"] == [
        {
            "title": "Reward",
            "unit": "share",
            "series": [
                {"name": "reward", "values": [0.5, 0.6, 0.7]},
                {"name": "pass_rate", "values": [0.5, 0.6, 0.7]},
            ],
        },
        {
            "title": "KL on routed tokens",
            "unit": "nats / token",
            "series": [{"name": "kl_fkl", "values": [0.1, None, None]}],
        },
        {
            "title": "Diagnostic types",
            "unit": "responses",
            "series": [
                {"name": kind, "values": [len(HOSTILE), None, None]}
                for kind in ("arithmetic", "counting")
            ],
            "stacked": True,
        },
        {
            "title": "unheard_of",
            "unit": "",
            "series": [{"name": "unheard_of", "values": [None, None, 3]}],
        },
    ]
    assert len(data["rollouts"]) == 2 * len(HOSTILE)


def test_curves_of_one_kind_stand_together():
    row = {
        "step": 0, "coverage_fkl": 0.0, "coverage_jsd": 0.2, "coverage_reweight": 0.1,
        "kl_jsd": 0.3, "sampler_drift": 0.01, "sampler_drift_max": 2.0, "sampler_kl": 0.02,
        "steps_skipped": 1.0,
    }  # fmt: skip
    drawn = {
        chart["title"]: [series["name"] for series in chart["series"]] for chart in charts([row])
    }
    assert drawn == {
        "KL on routed tokens": ["kl_jsd"],
        "Routed tokens": ["coverage_fkl", "coverage_jsd", "coverage_reweight"],
        "Sampler drift": ["sampler_drift", "sampler_kl"],
        "Largest sampler drift": ["sampler_drift_max"],
        "Steps skipped": ["steps_skipped"],
    }


def test_phases_are_stacked_to_a_step_and_those_made_ahead_to_a_chart_of_their_own():
    turns = {"step": 0, "seconds": 10.0, "seconds_sample": 6.0, "seconds_train": 3.5}
    ahead = turns | {"step": 1, "seconds": 5.0, "seconds_wait": 1.0, "sampling_overlap": 0.8}
    drawn = {chart["title"]: chart for chart in charts([turns, ahead])}
    assert drawn["Sampling"]["series"] == [{"name": "sampling_overlap", "values": [None, 0.8]}]
    together, alone = drawn["Time per step"], drawn["Made ahead, while the step before trains"]
    assert together["stacked"]
    assert alone["stacked"]
    assert together["series"] == [
        {"name": "seconds_sample", "values": [6.0, None]},
        {"name": "seconds_train", "values": [3.5, 3.5]},
        {"name": "other", "values": [0.5, 0.5]},
        {"name": "seconds_wait", "values": [None, 1.0]},
    ]
    assert alone["series"] == [{"name": "seconds_sample", "values": [None, 6.0]}]


def test_utilisation_and_memory_are_drawn_by_unit():
    row = {
        "step": 0, "mfu": 0.4, "gpu_busy": 0.9, "sampling_share": 0.5, "tokens_per_second": 80.0,
        "tokens_per_second_per_gpu": 10.0, "peak_memory_gib_train": 3.0,
        "peak_memory_gib_sample": 2.0,
    }  # fmt: skip
    drawn = {
        chart["title"]: [series["name"] for series in chart["series"]] for chart in charts([row])
    }
    assert drawn == {
        "Throughput": ["tokens_per_second"],
        "Throughput per GPU": ["tokens_per_second_per_gpu"],
        "GPU utilisation": ["mfu", "gpu_busy"],
        "Sampling": ["sampling_share"],
        "Peak memory": ["peak_memory_gib_train", "peak_memory_gib_sample"],
    }


def test_a_new_route_needs_no_change_of_the_viewer(tmp_path):
    root = Path(__file__).parents[3]
    copy = tmp_path / "trace_opd"
    for name in ("schemas", "data", "pipelines", "trace"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "__init__.py", copy)
    labels = copy / "schemas" / "labels.py"
    text = labels.read_text(encoding="utf-8")
    labels.write_text(text.replace("    REWEIGHT = 4\n", "    REWEIGHT = 4\n    CHI2 = 5\n", 1))
    code = """
import pyarrow as pa
from trace_opd.pipelines.cli.show import _STYLES
from trace_opd.pipelines.viewer import facets, page
from trace_opd.pipelines.viewer.paint import Paint
from trace_opd.pipelines.viewer.training_curves import charts
from trace_opd.schemas.labels import Route
assert [Paint.PLAIN, *Paint][Route.CHI2 + 1].name == "CHI2" and len(Paint) == 8
assert set(_STYLES) == set(Paint)
assert page.ROUTES[-1] == "chi2"
assert ".p-chi2 { background: var(--c5-bg);" in page.STYLE and "rect.chi2" in page.STYLE
(chart,) = charts([{"step": 0, "kl_fkl": 0.1, "kl_chi2": 0.2}])
assert [series["name"] for series in chart["series"]] == ["kl_fkl", "kl_chi2"]
routes = facets.route_masks(pa.array([[0, 1, 5], []], pa.list_(pa.uint8())))
routed = pa.table({"routes": routes, "dropped_tokens": [0, 0]})
assert facets.route_facets(routed)[0].values == ["fkl + chi2", "grpo"]
"""
    command = [sys.executable, "-P", "-c", code]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_online_table_finds_the_policy_of_its_training_run(tmp_path, tokenizer):
    run = make_run(tmp_path, tokenizer, [["ab\ncd\nefghijklmnop\n"]], alpha=0.2)
    trained = finish_training(run, [{"step": 0, "phase": "online", "reward": 1.0}])
    online, made = {"online": trained.ref}, run.problems
    for stage, role, contract in (
        ("rollout", "problems", ROLLOUTS),
        ("verify", "rollouts", VERDICTS),
        ("annotate", "verdicts", ANNOTATIONS),
        ("convert", "annotations", ROUTED_TABLE),
    ):
        (source,) = [d for d in run.store.datasets(stage) if "online" not in d.manifest["config"]]
        draft = run.store.begin(stage, online, {role: made}, contract)
        draft.write_part(0, source.read())
        made = draft.finish(1)
    page = report_page.run(ReportConfig(dataset=made.ref), run.store).read_text("utf-8")
    assert page_data(page)["rollouts"][0]["exact"]


def test_train_run_without_online_tables_shows_what_it_was_trained_on(hostile_run):
    trained = finish_training(hostile_run, [{"step": 0, "phase": "offline", "reward": 0.5}])
    page = report_page.run(ReportConfig(dataset=trained.ref), hostile_run.store).read_text("utf-8")
    assert len(page_data(page)["rollouts"]) == 2 * len(HOSTILE)


# --- in a browser --------------------------------------------------------------------------------


# --- in the terminal -----------------------------------------------------------------------------


def shown(prefix: str, store: Store, color: bool = False) -> str:
    out = StringIO()
    show_rollout(prefix, store, Console(file=out, width=100, force_terminal=color))
    return out.getvalue()


def test_every_paint_differs_without_colours():
    styles = set()
    for paint in Paint:
        style = response_text([Piece("a", paint, -1, None)]).spans
        parsed = Style.parse(str(style[0].style)) if style else Style()
        styles.add((parsed.bold, parsed.italic, parsed.underline, parsed.underline2, parsed.strike))
    assert len(styles) == len(Paint)


def test_show_prints_the_newest_routing_of_a_rollout(hostile_run):
    text = shown(content_hash([0, 0])[:10], hostile_run.store)
    assert hostile_run.routed.ref in text
    assert "What is 0+1? <b>bold</b>" in text
    assert "1, right (ok)" in text
    assert "arithmetic" in text
    assert "hand (ok)" in text
    assert "⁰plain 0" in text
    assert "²7" in text


def test_show_sends_no_control_sequence_of_a_response_to_the_terminal(hostile_run):
    rollout_id = content_hash([4, 1])  # the response with escapes
    plain = shown(rollout_id, hostile_run.store)
    assert "␛[31mred␛]0;pwned␇" in plain
    assert not set(plain) & {"\x1b", "\x07"}
    colored = shown(rollout_id, hostile_run.store, color=True)
    assert set(re.findall("\x1b(.)", colored)) == {"["}  # rich's own styles
    assert "\x1b[31m" not in colored


def test_show_refuses_unknown_and_ambiguous_ids(hostile_run):
    with pytest.raises(InputError, match="dataset or annotated rollout 'zzzz' is not in"):
        shown("zzzz", hostile_run.store)
    ids = [content_hash([i, s]) for i in range(len(HOSTILE)) for s in (0, 1)]
    firsts = [rollout_id[0] for rollout_id in ids]
    shared = next(first for first in firsts if firsts.count(first) > 1)
    with pytest.raises(InputError, match="is ambiguous in convert/"):
        shown(shared, hostile_run.store)
    with pytest.raises(InputError, match="rollout id is empty"):
        shown("", hostile_run.store)
