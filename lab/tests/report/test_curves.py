"""The figure shows all runs, and what was not measured leaves gaps."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from lab.tests.made_runs import DENSE, MIXED, UNTIMED, documents
from semisparse_lab.report import style
from semisparse_lab.report.curves import HEIGHT, curves
from semisparse_lab.train.results import EpochRecord, Scores


def drawn(*results, **options) -> np.ndarray:
    content = curves(documents(*results), **options)
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return imread(io.BytesIO(content), format="png")


def test_the_sparse_phase_of_a_run_with_both_phases_is_shaded() -> None:
    shaded, plain = drawn(DENSE, MIXED, UNTIMED), drawn(DENSE, replace(MIXED, phases=DENSE.phases), UNTIMED)
    assert shaded.shape == plain.shape == (style.DPI * HEIGHT, style.DPI * style.WIDTH, 4)
    # The shade covers two thirds of the width of three quarters of the picture, axes and legend not counted.
    assert (shaded != plain).any(axis=-1).mean() > 0.2


def test_means_over_several_seeds_have_bands_and_no_shade() -> None:
    runs = documents(DENSE, MIXED)
    again = [{**document, "seed": 1} for document in runs]
    plain = documents(DENSE, replace(MIXED, phases=DENSE.phases))
    assert curves([*runs, *again]) == curves([*plain, *again])


def test_the_loss_may_be_on_a_logarithmic_scale() -> None:
    assert (drawn(DENSE, MIXED) != drawn(DENSE, MIXED, log_loss=True)).any()


def test_flip_rates_that_were_not_measured_leave_gaps() -> None:
    some = replace(DENSE, epochs=(replace(DENSE.epochs[0], flip_rate=None), *DENSE.epochs[1:]))
    assert (drawn(DENSE) != drawn(some)).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("log_loss", [True, False])
def test_losses_that_are_not_finite_are_left_out(value: float, log_loss: bool) -> None:
    broken = replace(DENSE, epochs=(EpochRecord(10, value, Scores(value, 0.1)),))
    assert drawn(broken, log_loss=log_loss).size
