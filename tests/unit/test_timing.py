"""Stages add up, and the rate of a product is that of a product."""

import time

import pytest
import torch

from moescope.timing import Stages, gemm_rate


def test_stages_add_up_and_a_failing_one_counts():
    stages = Stages()
    for _ in range(2):
        with stages("sleep"):
            time.sleep(0.01)
    with pytest.raises(ValueError, match="stop"), stages("fail"):
        raise ValueError("stop")
    assert stages.seconds["sleep"] >= 0.02
    assert set(stages.rounded()) == {"sleep", "fail"}
    assert stages.rounded()["sleep"] == round(stages.seconds["sleep"], 4)


def test_a_product_runs_at_some_rate():
    """Between what a microcontroller and a data centre do."""
    assert 1e6 < gemm_rate(torch.device("cpu"), size=64) < 1e16
