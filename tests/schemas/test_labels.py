"""The enumerations of diagnostic types and of mistakes, and the words of their labels."""

import pytest

from trace_opd.schemas.configs import PromptConfig
from trace_opd.schemas.labels import (
    MISTAKE_IN,
    TYPE_LABELS,
    WORDS,
    DiagnosticType,
    ErrorType,
    SpanKind,
    type_label,
    types_of,
    words_sha256,
)


def test_every_label_has_words_of_its_own():
    assert set(WORDS) == set(DiagnosticType) | set(ErrorType) == set(TYPE_LABELS)
    assert len(set(WORDS.values())) == len(WORDS)
    for label, words in WORDS.items():
        assert words == words.strip(), label
        assert words[0].islower(), label
        assert words[-1].isalpha(), label


def test_a_label_belongs_to_one_enumeration():
    assert not {str(label) for label in DiagnosticType} & {str(label) for label in ErrorType}
    for label in TYPE_LABELS:
        assert type_label(str(label)) is label
        assert type_label(label) is label
    with pytest.raises(ValueError, match="'sloppiness' is not a valid"):
        type_label("sloppiness")


def test_each_type_of_step_has_a_mistake_of_its_own():
    assert set(MISTAKE_IN) == set(DiagnosticType)
    assert len(set(MISTAKE_IN.values())) == len(MISTAKE_IN)
    assert MISTAKE_IN[DiagnosticType.CASE_ANALYSIS] is ErrorType.OMITTED_CASE


def test_only_errors_have_a_vocabulary_of_mistakes_and_only_if_it_is_asked_for():
    assert types_of(SpanKind.ERROR, True) == tuple(ErrorType)
    for kind, asked in ((SpanKind.KEY, True), (SpanKind.KEY, False), (SpanKind.ERROR, False)):
        assert types_of(kind, asked) == tuple(DiagnosticType)


def test_ids_cover_the_words_only_where_the_teacher_reads_them(monkeypatch: pytest.MonkeyPatch):
    label = PromptConfig(teacher="{problem} {diagnostic_type}")
    words = PromptConfig(teacher="{problem} {diagnosis}")
    assert "words" not in label.semantic()
    before, plain = words.semantic(), label.semantic()
    assert before["words"] == words_sha256()
    monkeypatch.setitem(WORDS, ErrorType.MISCOUNT, "something counted twice")
    assert words.semantic() != before
    assert label.semantic() == plain


def test_a_teachers_template_takes_label_and_words_and_no_other_field():
    PromptConfig(teacher="{problem} {diagnostic_type}: {diagnosis}")
    for name in ("student", "privileged"):
        with pytest.raises(ValueError, match=f"{name} template has unknown field diagnosis"):
            PromptConfig.model_validate({name: "{problem} {diagnosis}"})
