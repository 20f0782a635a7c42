"""The share of a GPU's memory that an engine takes next to a trainer."""

import pytest
import torch

from trace_opd.pipelines.samplers.gpu_share import engine_share, trained_bytes
from trace_opd.schemas.errors import InputError

GIB = 2**30


def test_an_engine_alone_takes_nine_tenths_of_what_is_free():
    assert engine_share(60 * GIB, 80 * GIB, 0, ahead=False) == 0.675  # 54 of 80


def test_the_optimisers_states_which_come_later_are_left_free():
    # Weights of 10 GiB get states of 20: 0.9 · (60 − 20) / 80.
    assert engine_share(60 * GIB, 80 * GIB, 10 * GIB, ahead=False) == 0.45


def test_an_engine_that_is_awake_during_training_takes_half_and_leaves_the_gradients_room():
    # 0.5 · (60 − 30) / 80 = 0.1875, cut to three digits.
    assert engine_share(60 * GIB, 80 * GIB, 10 * GIB, ahead=True) == 0.187


def test_a_gpu_without_room_is_refused():
    with pytest.raises(
        InputError, match=r"30\.0 GiB of the GPU's 80\.0 GiB are free, .* 40\.0 GiB"
    ):
        engine_share(30 * GIB, 80 * GIB, 20 * GIB, ahead=False)


def test_frozen_weights_have_no_optimiser_states():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 8))
    model[1].requires_grad_(False)
    assert trained_bytes(model) == 4 * 8 * 4
