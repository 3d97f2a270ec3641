"""SparseConfig(repack=True): the backward packs W~^T from the weight, and nothing packed is kept until then."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from semisparse import PackedWeights, SemiSparseLinear, SparseConfig
from semisparse.config import GradOutput
from semisparse.errors import ConfigError
from semisparse.testing import assert_bit_equal
from tests.functional.counting import CountOps
from tests.nn.packing import BF16, X, in_place, results

pytestmark = pytest.mark.usefixtures("packed_on_cpu")


def pair(grad_output: GradOutput | None = None, dtype: torch.dtype = BF16) -> tuple[nn.Sequential, nn.Sequential]:
    """Two models that differ in repack alone."""
    torch.manual_seed(0)
    config = SparseConfig(grad_output=grad_output)
    kept = nn.Sequential(*(SemiSparseLinear(16, 16, dtype=dtype, config=config) for _ in range(3)))
    again = copy.deepcopy(kept)
    for layer in again:
        layer.sparse_config = SparseConfig(grad_output=grad_output, repack=True)
    return kept, again


@pytest.mark.parametrize("grad_output", [None, "mvue"])
def test_results_are_the_same(grad_output: GradOutput | None) -> None:
    kept, again = pair(grad_output)
    for ours, expected in zip(results(again), results(kept), strict=True):
        assert_bit_equal(ours, expected)


def test_nothing_packed_is_saved() -> None:
    kept, again = pair()
    found: dict[str, list[torch.dtype]] = {}
    for name, model in (("kept", kept), ("again", again)):
        saved = found.setdefault(name, [])

        def keep(tensor: Tensor, saved: list[torch.dtype] = saved) -> Tensor:
            saved.append(tensor.dtype)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(X.clone().requires_grad_())
    assert found == {"kept": [BF16, torch.uint8] * 3, "again": [BF16, BF16] * 3}


def test_the_backward_packs_the_transpose_alone() -> None:
    _, again = pair()
    with CountOps() as forward:
        y = again(X.clone().requires_grad_()).float().square().sum()
    with CountOps() as backward:
        y.backward()
    assert forward.counts["pack"] == 3 and "pack_transpose" not in forward.counts
    assert backward.counts["pack_transpose"] == 3 and "pack" not in backward.counts


def test_compiled_in_transforms_and_under_autocast() -> None:
    torch._dynamo.reset()
    kept, again = pair()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(again, backend=counter, fullgraph=True)
    for _ in range(2):
        for ours, expected in zip(results(again, X, compiled), results(kept), strict=True):
            assert_bit_equal(ours, expected)
        in_place(kept)
        again.load_state_dict(kept.state_dict())
    assert counter.frame_count == 1
    losses = [torch.func.grad(lambda x, of=of: of(x).float().square().sum())(X) for of in (kept, again)]
    assert_bit_equal(*losses)
    kept, again = pair(dtype=torch.float32)
    with torch.autocast("cpu", BF16):
        for ours, expected in zip(results(again, X.float()), results(kept, X.float()), strict=True):
            assert_bit_equal(ours, expected)
    torch._dynamo.reset()


def test_weights_that_are_packed_per_step_are_used_as_they_are() -> None:
    _, again = pair()
    weights = PackedWeights(again)
    weights.pack()
    with CountOps() as counter:
        again(X.clone().requires_grad_()).float().square().sum().backward()
    assert not {"pack", "pack_linear", "pack_transpose"} & counter.counts.keys()


@pytest.mark.parametrize(
    "others",
    [{"weight": "row"}, {"weight": None, "activation": "transposable"}, {"precision": "fp8"}, {"weight": "soft"}],
)
def test_layers_that_keep_no_transpose_cannot_repack_it(others: dict[str, str | None]) -> None:
    with pytest.raises(ConfigError, match="repack=True"):
        SparseConfig(repack=True, **others)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"repack=1\.5"):
        SparseConfig(repack=1.5)  # type: ignore[arg-type]


def test_settings_say_it() -> None:
    assert "repack=True" in str(SparseConfig(repack=True))
    assert "repack" not in str(SparseConfig())
