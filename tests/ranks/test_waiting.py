"""One rank works for long while the others wait, or ends while they wait. See rehearsal.py."""

import os
import signal

import pytest

from .torchrun import CONFIG, HERE, OURS, SHORT, annotator, children, forked, sentences, started


@pytest.mark.slow
def test_ranks_wait_for_an_annotator_longer_than_for_a_device(forks, root):
    """The annotator annotates, then closes: each takes longer than the devices' time-out."""
    program, slow = HERE / "device_timeout.py", annotator("Slow", seconds=10)
    forked(forks, 2, "gloo", 8, root, CONFIG, *SHORT, slow, program=program)
    assert len(list(root.glob("train/*/manifest.json"))) == 1


@pytest.mark.ranks
def test_a_killed_rank_ends_the_others_while_they_wait_for_an_annotator(root):
    """The first annotates for hours."""
    train = ["train", CONFIG, *SHORT, annotator("Slow", seconds=10_000), "--store", root]
    with started(2, *train, launcher=OURS) as process:
        assert process.stdout is not None
        assert process.stdout.readline()  # the memory that the run will need
        assert process.stdout.readline() == "annotating\n"
        os.kill(children(process)[0], signal.SIGKILL)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert sentences(error)[-1] == "trace-opd: rank 0 was ended by SIGKILL"
    assert "Traceback" not in error
