"""What README shows on a GPU: its first example multiplies sparse, and activation checkpointing changes nothing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from semisparse import SparseConfig, sparsify
from semisparse.testing import assert_bit_equal
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
    first, second = report
    assert all(row.forward.startswith("cuSPARSELt algorithm") for row in report)
    assert second.backward.startswith("cuSPARSELt algorithm")
    assert first.backward == "dense: no gradient with a 2:4 operand"  # its input needs no gradient


def test_activation_checkpointing_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to("cuda", torch.bfloat16)
    sparsify(model, SparseConfig(backend="cusparselt"))
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    outputs, gradients = [], []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        outputs.append(call(x))
        outputs[-1].float().square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert_bit_equal(*outputs)
    for one, other in zip(*gradients, strict=True):
        assert_bit_equal(one, other)
