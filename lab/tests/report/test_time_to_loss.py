"""Time to loss from made-up runs whose curves are known."""

from pathlib import Path

import pytest
from scipy.stats import t

from lab.tests.made_timed import LOST, made, write
from semisparse_lab.errors import DataError
from semisparse_lab.report.time_to_loss import (
    STEP,
    at_end,
    at_equal_seconds,
    below,
    bits_at,
    by_budget,
    seconds_to,
    times_faster,
)
from semisparse_lab.report.time_to_loss_card import write_card
from semisparse_lab.report.timed_document import load_timed


def test_values_between_scores_lie_on_a_line() -> None:
    run = made("bf16", 0)
    assert bits_at(run, 4.0) == pytest.approx(2.8) and bits_at(run, 5.0) == pytest.approx(2.75)
    assert seconds_to(run, 2.75) == pytest.approx(5.0) and seconds_to(run, 2.9) == pytest.approx(2.0)
    assert seconds_to(run, 1.0) is None
    assert bits_at(run, 2.5, STEP) == pytest.approx(2.75)


def test_arms_are_compared_at_their_ends_and_where_the_shorter_run_ends() -> None:
    runs = [made(arm, seed) for arm in ("bf16", "fp8-24") for seed in (0, 1, 2)] + [made("fp8-24", 3)]
    dense, fast = by_budget(runs)["tokens"]
    ends = at_end(fast, dense)
    assert ends.seeds == (0, 1, 2) and ends.values == pytest.approx((2.0, 1.97, 1.94))
    assert ends.shares == pytest.approx([0, 1.97 / 1.99 - 1, 1.94 / 1.98 - 1])
    equal = at_equal_seconds(fast, dense)
    assert equal.seconds == (10.0, 10.0, 10.0) and equal.reference == pytest.approx((2.5, 2.49, 2.48))
    assert equal.values == pytest.approx(ends.values)
    assert times_faster(fast, dense)[0] == pytest.approx(2.0) and times_faster(dense, fast)[0] == pytest.approx(0.5)


def test_p_is_that_of_a_paired_test_in_one_direction() -> None:
    ours, theirs = [1.0, 2.0, 3.0], [1.1, 2.3, 3.2]
    statistic = -0.2 / (0.1 / 3**0.5)  # mean and standard deviation of -0.1, -0.3, -0.2
    assert below(ours, theirs) == pytest.approx(t.cdf(statistic, 2))
    assert below(theirs, ours) == pytest.approx(t.sf(statistic, 2))
    assert below([1.0], [2.0]) is None and below([1.0, 2.0], [2.0, 3.0]) is None


def test_a_card_tells_of_any_set_of_runs(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "results",
        *(made(arm, seed) for arm in ("bf16", "float8", "fp8-24") for seed in (0, 1)),
        made("fp8-24", 2, **LOST),
        made("fp8-24", 0, "seconds", 20),
    )
    text = write_card(folder, tmp_path).read_text()
    assert "| fp8 + 2:4 | 0, 1, 2 diverged | 10 |" in text
    assert text.index("## Runs of equal tokens") < text.index("## Runs of equal seconds")
    # Seed 0 reads 2.0 against 2.5, seed 1 1.97 against 2.49.
    against_dense = text[text.index("| to dense bf16 |") : text.index("| to torchao float8 |")]
    assert "| fp8 + 2:4 | 0, 1 | -0.50 ± 0.71 % | 0.250 | -20.44 ± 0.62 % |" in against_dense
    # bf16's run of equal tokens is also that of equal seconds: it ends at 2.0, when the longer run is at 1.0.
    assert "| fp8 + 2:4 | 0 | -50.00 % |  | -50.00 % |  | 2.00x |" in text
    assert "| to fp8 + 2:4 |" not in text  # it is none of the references, which come first in the study
    assert "75.0% of its multiplications" in text and "learning rate of 0.0002" in text
    assert "| fp8 + 2:4 | 1000.0 | 1000.0 | 10.0 ± 0.0 |" in text and "| dense bf16 |  | 2000.0 |" in text
    assert "--seeds 0,1,2 --budget tokens`" in text
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_or_mixed_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished run"):
        write_card(tmp_path, tmp_path)
    damages: tuple[dict, ...] = (
        {"seconds": "x"}, {"scores": [[1, 2]]}, {"test": {}}, {"title": None}, {"phases": [{"kind": "dense"}]},
        {"phases": [{"kind": "dense", "seconds_per_step": "1"}]},
    )  # fmt: skip
    for number, changes in enumerate(damages):
        with pytest.raises(DataError, match="is not a result"):
            load_timed(write(tmp_path / str(number), made("bf16", 0, **changes)))
    with pytest.raises(DataError, match="are not those of this study"):
        write_card(write(tmp_path / "unknown", made("bf16", 0, settings={"lr": 1})), tmp_path)
    with pytest.raises(DataError, match="other settings"):
        load_timed(write(tmp_path / "mixed", made("bf16", 0), made("bf16", 1, settings={})))
