"""Writes the records of planted defects, of faults and of the trust suite into docs/reliability.md.

python tests/reliability.py                 write the page from the records
python tests/reliability.py RUN.json ...    first add these runs of the trust suite; the last run of a part counts
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the file runs as a script from anywhere

from benchmarks.blocks import filled  # noqa: E402
from tests.defects import report as defects  # noqa: E402
from tests.faults import report as faults  # noqa: E402
from tests.trust import report as trust  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"


def page() -> str:
    """The page with the tables of the records."""
    tables = {
        "defects": defects.table(json.loads(defects.RECORD.read_text(encoding="utf-8"))),
        "faults": faults.table(json.loads(faults.RECORD.read_text(encoding="utf-8"))),
        "trust": trust.table(trust.read(trust.RECORD)),
    }
    return filled([PAGE], tables)[PAGE]


def main(runs: list[str]) -> None:
    """Add runs to the record of the trust suite, and write the page.

    Args:
        runs: Paths of files that `python -m tests.trust` wrote.
    """
    if runs:
        trust.add([json.loads(Path(name).read_text(encoding="utf-8")) for name in runs])
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
