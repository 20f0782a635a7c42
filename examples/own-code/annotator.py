"""Marks lines with a carry. The manual: OwnAnnotator in pipelines/annotators/own.py."""

from trace_opd.pipelines.annotators.rows import Reading


class Carries:
    def __init__(self, options: dict) -> None:
        self.sign = options.get("sign", "c1")

    def annotate(self, items):
        for item in items:
            lines = [i for i in range(len(item.segments)) if self.sign in item.text(i)]
            if lines:
                yield Reading("ok", [[i] for i in lines], "case_analysis")
            else:
                yield Reading("empty")
