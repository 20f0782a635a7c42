"""Code of one's own for stages of the kill tests: a reward, and a sampler of programs."""

from trace_opd.trace.protocols import Completion

PROGRAM = "```python\ndef total(a, b):\n    return a + {}\n```"


def carries(response, answer):
    """The share of the answer's digits that the response has anywhere; feedback if one lacks."""
    found = sum(digit in response for digit in answer)
    share = found / len(answer)
    return {"reward": share, "feedback": None if share == 1 else f"{found} of {len(answer)}"}


class Programs:
    """Right programs for even seeds, wrong ones for odd seeds."""

    def sample(self, prompts, sampling, seeds):
        return [
            [Completion(PROGRAM.format("ab"[seed % 2 == 0]), "stop") for seed in own]
            for own in seeds
        ]
