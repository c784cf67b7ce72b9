# SPDX-License-Identifier: Apache-2.0
"""Tests the predicted training step: the docs are current, the target holds, and it follows from what is counted."""

from dataclasses import replace

import pytest

from tests import gpu_prediction
from tests.gpu_prediction import INSTRUCTIONS, Assumptions, attention_ms, predict, total, windows, worst_share

LAST = "accelerated, channels-last convolutions"


def test_windows_are_those_of_four_stages():
    assert windows() == [(343 * 3, 343), (64 * 6, 343), (8 * 12, 343), (24, 216)]


def test_the_attentions_time_is_instructions_over_the_rate():
    one = {"shifted": (1, 0, 0, 0), "not shifted": (1, 0, 0, 0)}
    scores = 2 * ((1029 + 384 + 96) * 384**2 + 24 * 256**2)
    assert attention_ms(Assumptions(issue=1.0, lanes_per_s=1e12), one) == pytest.approx(scores / 1e9)
    before = {"shifted": (53, 51, 78, 62), "not shifted": (53, 51, 78, 62)}
    assert attention_ms(Assumptions(), before) > 2 * attention_ms(Assumptions(), INSTRUCTIONS)


@pytest.mark.slow
def test_the_docs_show_the_prediction_as_it_is_now():
    text = gpu_prediction.DOCS.read_text(encoding="utf-8")
    shown = text.partition(gpu_prediction.MARKS[0])[2].partition(gpu_prediction.MARKS[1])[0]
    assert shown == gpu_prediction.table(), "run python -m tests.gpu_prediction --write"


@pytest.mark.slow
def test_the_predicted_step_is_at_most_0_6_of_monais_and_below_the_compiled_one():
    predicted = {name: total(parts) for name, parts in predict().items()}
    assert predicted[LAST] <= 0.6 * predicted["MONAI eager"]
    assert predicted[LAST] < predicted["torch.compile(MONAI)"]
    assert predicted["accelerated, compiled"] < predicted["torch.compile(MONAI)"]
    # Without the channels-last path it is not reached, and said so.
    assert predicted["accelerated"] > 0.6 * predicted["MONAI eager"]
    assert worst_share()[0] <= 0.6


@pytest.mark.slow
def test_every_assumption_and_every_instruction_counts():
    base = {name: total(parts) for name, parts in predict().items()}
    for field, value in vars(Assumptions()).items():
        other = {name: total(parts) for name, parts in predict(replace(Assumptions(), **{field: value / 8})).items()}
        assert other != base, field
    slower = {kind: tuple(2 * n for n in passes) for kind, passes in INSTRUCTIONS.items()}
    assert total(predict(instructions=slower)[LAST]) > base[LAST] + 1


@pytest.mark.slow
def test_the_counts_are_those_of_the_network():
    counts, parameters = gpu_prediction.counted()
    assert 60e6 < parameters < 65e6
    softmax = [c for c in counts if c.name == "_softmax"]
    assert sum(c.calls for c in softmax) == 8
    # Three times the forward pass's, less the first convolutions' gradient to the volume.
    forward, backward = (sum(c.flops for c in counts if c.name == n) for n in ("convolution", "convolution_backward"))
    assert 1.9 < backward / forward <= 2
