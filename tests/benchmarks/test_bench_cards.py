"""The page of cards, from self-checks."""

from pathlib import Path

import pytest

from benchmarks import bench_cards, store, table
from semisparse.errors import BenchError
from semisparse.selfcheck import files
from tests.selfcheck.reports import report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files.write(tmp_path / "bench-h100.json", report())
    files.write(tmp_path / "bench-sent-4090.json", report((8, 9), "RTX 4090 | <b>[x](y)"))
    files.write(tmp_path / "bench-t4.json", report((7, 5), "T4"))
    return tmp_path


def test_each_architecture_has_a_line_and_says_who_ran_it(folder: Path) -> None:
    rows = {row[0]: row[1:] for row in bench_cards.table(bench_cards.reports(folder), {"sm80"}).rows}
    assert list(rows) == [*bench_cards.CARDS, "sm75"]
    assert rows["sm90"] == (
        "NVIDIA H100 80GB HBM3", "by us, 2026-11-26", "1 of 1, 1 skipped", "**1.14**", "**2.00**", "**1.25**", "",
    )  # fmt: skip
    assert rows["sm89"][1] == "sent in, 2026-11-26"
    assert rows["sm80"][:2] == ("A100", "benchmarks, no self-check")
    assert rows["sm120"][:2] == ("RTX 5080, RTX 5090", "not run by us")


def test_what_a_user_sent_is_no_markup_and_fits_the_page(folder: Path) -> None:
    lines = bench_cards.block(bench_cards.reports(folder)).splitlines()
    (line,) = [line for line in lines if line.startswith("| sm89")]
    assert line.count("|") == 9 and not {"<", "[", "`"} & set(line)
    assert max(len(line) for line in lines if line.startswith("|")) <= table.WIDTH + 2


def test_a_damaged_file_or_one_without_a_gpu_stops_the_page(folder: Path) -> None:
    lonely = report()
    lonely.gpu = None
    files.write(folder / "bench-cpu.json", lonely)
    with pytest.raises(ValueError, match="is a self-check without a GPU"):
        bench_cards.reports(folder)
    (folder / "bench-cpu.json").write_text("{}")
    with pytest.raises(BenchError):
        bench_cards.reports(folder)


def test_what_is_stored_can_be_read_and_benchmarks_of_ours_are_known() -> None:
    assert all(name.startswith("bench-") for name, _ in bench_cards.reports(store.RESULTS))
    assert "sm90" in bench_cards.benchmarked()
