"""Time to loss from made-up runs whose curves are known."""

import json
from pathlib import Path

import pytest
from scipy.stats import t

from semisparse_lab.errors import DataError
from semisparse_lab.report.time_to_loss import (
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

ORDER = ("bf16", "float8", "fp8-24")
PACE = {"bf16": 2.0, "float8": 1.5, "fp8-24": 1.0}
"""Seconds per step."""
STEPS = 10


def made(arm: str, seed: int, budget: str = "tokens", steps: int = STEPS, **changes: object) -> dict:
    """A run that falls by 0.1 bits per byte and step from 3, a hundredth less for each seed."""
    bits = [3 - 0.1 * step - 0.01 * seed * (1 + ORDER.index(arm)) for step in range(1, steps + 1)]
    score = {"nats_per_token": 2 * bits[-1], "bits_per_byte": bits[-1], "bytes": 1}
    return {
        "kind": "time-to-loss", "experiment": "toy", "title": "Toy", "arm": arm, "arm_title": f"arm {arm}",
        "order": ORDER.index(arm), "seed": seed, "budget": budget, "steps": steps, "settings": {"lr": 1},
        "tokens_per_step": 100, "multiplications": {"block_linears": 3, "head": 1}, "curve": [[1, 1.0, 2.0]],
        "scores": [[step, step * PACE[arm], 2 * bits[step - 1], bits[step - 1]] for step in range(1, steps + 1)],
        "phases": [], "seconds": steps * PACE[arm], "finished": True, "peak_memory": {"bytes": 2**30, "kind": "made"},
        "environment": {"torch": "1", "triton": "2", "cuSPARSELt": "3"}, "gpu": "none", "commit": None,
        "start_seconds": [1.0], "score_seconds": 2.0, "final_seconds": 3.0, "wall_seconds": 4.0, "torchao": None,
        "validation": score, "test": score, "tokens_per_second": 100 / PACE[arm], **changes,
    }  # fmt: skip


def write(folder: Path, *runs: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for run in runs:
        name = f"toy.{run['arm']}.{run['budget']}.seed{run['seed']}.json"
        (folder / name).write_text(json.dumps(run))
    return folder


def test_values_between_scores_lie_on_a_line() -> None:
    run = made("bf16", 0)
    assert bits_at(run, 4.0) == pytest.approx(2.8) and bits_at(run, 5.0) == pytest.approx(2.75)
    assert seconds_to(run, 2.75) == pytest.approx(5.0) and seconds_to(run, 2.9) == pytest.approx(2.0)
    assert seconds_to(run, 1.0) is None


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
    lost = {"test": None, "validation": None, "scores": [[1, 1.0, None, None]], "tokens_per_second": None}
    folder = write(
        tmp_path / "results",
        *(made(arm, seed) for arm in ORDER for seed in (0, 1)),
        made("fp8-24", 2, **lost),
        made("fp8-24", 0, "seconds", 20),
    )
    text = write_card(folder, tmp_path).read_text()
    assert "| arm fp8-24 | 0, 1, 2 diverged | 10 |" in text
    assert text.index("## Runs of equal tokens") < text.index("## Runs of equal seconds")
    # Seed 0 reads 2.0 against 2.5, seed 1 1.97 against 2.49.
    assert "| arm fp8-24 against arm bf16 | -0.50 ± 0.71 % | 0.250 | -20.44 ± 0.62 % |" in text
    # bf16's run of equal tokens is also that of equal seconds: it ends at 2.0, when the longer run is at 1.0.
    assert "| arm fp8-24 against arm bf16 | -50.00 % |  | -50.00 % |  | 2.00x sooner |" in text
    assert "against arm fp8-24" not in text  # it is none of the references, which come first in the study
    assert "75.0% of the model's multiplications" in text
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_or_mixed_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished run"):
        write_card(tmp_path, tmp_path)
    for number, changes in enumerate(({"seconds": "x"}, {"scores": [[1, 2]]}, {"test": {}}, {"title": None})):
        with pytest.raises(DataError, match="is not a result"):
            load_timed(write(tmp_path / str(number), made("bf16", 0, **changes)))
    with pytest.raises(DataError, match="other settings"):
        load_timed(write(tmp_path / "mixed", made("bf16", 0), made("bf16", 1, settings={})))
