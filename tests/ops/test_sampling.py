"""The ops of "mvue": they draw the specification's sample, on the CPU and, with the simulated library, on CUDA."""

import pytest
import torch
from torch import Tensor

from semisparse import ops
from semisparse.errors import ShapeError, TensorError
from semisparse.formats.layout import SM90_16BIT, packed_bytes
from semisparse.formats.packed import PackedFormat
from semisparse.gemm import dispatch
from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.ops import packing, products, sampling
from semisparse.reference import mvue
from semisparse.testing import assert_bit_equal, small_integers
from tests.gemm.simulated import make_engine

DTYPE = torch.bfloat16
SEED = torch.tensor(-77)
TOKENS = [0, 1, 7, 16, 40]
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here the CPU plays the device")


def gradient_of(tokens: int, columns: int = 32, dtype: torch.dtype = DTYPE) -> Tensor:
    """Small integers whose samples are sums of a few of them: every product is exact."""
    return small_integers((tokens, columns), seed=tokens, dtype=dtype)


def drawn(gradient: Tensor, seed: Tensor | int) -> Tensor:
    return mvue.sample(gradient, seed).matrix


GRADIENTS = {
    "fp32": lambda: torch.randn(12, 8),
    "bf16, a partial group": lambda: torch.randn(13, 16).bfloat16(),
    "strided": lambda: torch.randn(16, 24)[::2, ::2].double(),
    "transposed": lambda: torch.randn(8, 12).mT,
    "no tokens": lambda: torch.randn(0, 8),
}


@pytest.mark.filterwarnings("ignore:.*is non-deterministic.*")
@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("seed", [None, SEED], ids=str)
def test_opcheck_and_the_specification(make, seed: Tensor | None) -> None:
    gradient = make()
    torch.library.opcheck(torch.ops.semisparse.sample.default, (gradient, seed))
    assert_bit_equal(ops.sample(gradient, seed), drawn(gradient, 0 if seed is None else seed).contiguous())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by torch 2.15's opcheck
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck_of_the_packing_ops(with_bias: bool) -> None:
    gradient, x = torch.randn(13, 32).to(DTYPE), torch.randn(13, 48).to(DTYPE)
    torch.library.opcheck(torch.ops.semisparse.pack_sample.default, (gradient, SEED, with_bias))
    torch.library.opcheck(torch.ops.semisparse.sampled_grad_weight.default, (gradient, x, SEED, with_bias, "auto"))
    operands = (x.clone().requires_grad_(), torch.randn(32, 48).to(DTYPE).requires_grad_(), None, SEED)
    torch.library.opcheck(torch.ops.semisparse.sampled_linear.default, operands)


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_packed_sample_is_the_sample(tokens: int) -> None:
    gradient = gradient_of(tokens)
    packed, bias = ops.pack_sample(gradient, SEED, True)
    rows = -(-tokens // 16) * 16
    assert packed.numel() == packed_bytes(32, rows)
    unpacked = ops.unpack(packed, 32, rows, DTYPE)[:, :tokens].mT
    assert_bit_equal(unpacked + 0.0, drawn(gradient, SEED) + 0.0)
    assert_bit_equal(bias, gradient.sum(0))
    assert ops.pack_sample(gradient, SEED, False)[1].numel() == 0


def test_a_batch_draws_as_its_members_do() -> None:
    gradients, seeds = torch.randn(3, 7, 8), torch.tensor([1, 2, 3])
    found = torch.func.vmap(ops.sample)(gradients, seeds)
    for one, gradient, seed in zip(found, gradients, seeds, strict=True):
        assert_bit_equal(one, drawn(gradient, seed))
    same = torch.func.vmap(ops.sample, in_dims=(1, None), out_dims=1)(gradients, seeds[0])
    assert_bit_equal(same[:, 2], drawn(gradients[:, 2].contiguous(), 1))


@pytest.mark.parametrize("seed", [torch.tensor(1, dtype=torch.int32), torch.tensor([1]), torch.tensor(1.0)], ids=str)
def test_a_seed_that_is_none_is_refused(seed: Tensor) -> None:
    for call in (
        lambda: ops.sample(torch.zeros(4, 4), seed),
        lambda: ops.pack_sample(torch.zeros(16, 16, dtype=DTYPE), seed, True),
        lambda: ops.sampled_grad_weight(torch.zeros(4, 4), torch.zeros(4, 4), seed, True, "auto"),
    ):
        with pytest.raises(TensorError, match=r"seed is .*must be int64 without dimensions"):
            call()
    with pytest.raises(ShapeError, match="multiple of 4"):
        ops.sample(torch.zeros(4, 6), None)


def test_a_seed_without_data_is_refused_instead_of_read() -> None:
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    for call in (
        lambda: ops.sample(torch.zeros(4, 4), seed),
        lambda: ops.pack_sample(torch.zeros(16, 16, dtype=DTYPE), seed, True),
        lambda: ops.sampled_grad_weight(torch.zeros(4, 4), torch.zeros(4, 4), seed, True, "auto"),
        lambda: ops.sampled_grad_weight(torch.zeros(4, 4), torch.zeros(4, 4, device="meta"), None, True, "auto"),
    ):
        with pytest.raises(TensorError, match="meta"):
            call()


# ---- the CUDA side


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    engine, library, _ = make_engine()
    tuner = Autotuner(engine, None, shipped=tuple)
    for module in (packing, products, sampling):
        monkeypatch.setattr(module, "packed_format", lambda *_: PackedFormat("compressor", None, "simulated"))
        monkeypatch.setattr(module, "engine", lambda: engine)
    monkeypatch.setattr(dispatch, "process_engine", lambda: engine)
    monkeypatch.setattr(dispatch, "autotuner", lambda: tuner)
    return library


@on_the_cpu
@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_weight_gradient_is_the_product_with_the_sample(library, tokens: int, backend: str) -> None:
    gradient, x = gradient_of(tokens), small_integers((tokens, 48), seed=1, dtype=DTYPE)
    memory = torch.empty(x.numel() + 1, dtype=DTYPE)
    memory[1:].view(x.shape).copy_(x)
    for given in (x, x.mT.contiguous().mT, memory[1:].view(x.shape)):
        for with_bias in (True, False):
            found, bias = sampling._cuda_sampled_grad_weight(gradient, given, SEED, with_bias, backend)
            exact = drawn(gradient, SEED).double().mT @ x.double()
            assert_bit_equal(found + 0.0, exact.to(DTYPE) + 0.0)
            assert bias.shape == ((32,) if with_bias else (0,))
            assert not with_bias or torch.equal(bias, gradient.sum(0))


@on_the_cpu
@pytest.mark.parametrize("packer", ["kernel", "reference"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_packer_packs_the_same_sample(monkeypatch, tokens: int, packer: str) -> None:
    monkeypatch.setattr(sampling, "packed_format", lambda *_: PackedFormat(packer, SM90_16BIT, "simulated"))
    gradient = gradient_of(tokens)
    packed, bias = sampling._cuda_pack_sample(gradient, SEED, True)
    expected, expected_bias = ops.pack_sample(gradient, SEED, True)
    assert packed.numel() == expected.numel()
    rows = -(-tokens // 16) * 16
    assert_bit_equal(ops.unpack(packed, 32, rows, DTYPE) + 0.0, ops.unpack(expected, 32, rows, DTYPE) + 0.0)
    assert_bit_equal(bias, expected_bias)
