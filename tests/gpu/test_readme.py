"""The first example of README multiplies sparse on a GPU, as it says."""

import pytest
import torch

from tests.arch.source import ROOT
from tests.arch.test_docs_examples import BLOCK

pytestmark = [
    pytest.mark.gpu,
    # torch's own, of cuBLAS on the autograd thread
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]


def test_the_first_example_of_readme_runs_sparse_products() -> None:
    found = BLOCK.search((ROOT / "README.md").read_text())
    assert found
    session: dict = {}
    exec(found[1], session)
    report = session["semisparse"].check(session["model"].to(torch.bfloat16), session["x"].to(torch.bfloat16))
    assert len(report) == 2
    for row in report:
        assert row.forward.startswith("cuSPARSELt algorithm") and row.backward.startswith("cuSPARSELt algorithm")
