"""The program whose types are checked also runs."""

from pathlib import Path

from tests import fresh

SCRIPT = Path(__file__).with_name("user_script.py")


def test_the_typed_program_of_a_user_runs(tmp_path: Path) -> None:
    result = fresh.run(SCRIPT, cwd=tmp_path, trains=True)
    assert result.returncode == 0, result.stderr
