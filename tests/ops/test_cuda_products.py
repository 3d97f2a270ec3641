"""The CUDA side on the simulated library: padding of tokens, alignment, biases, and packing without a kernel."""

import pytest
import torch

from semisparse.formats.layout import FP8, SM90_8BIT, SM90_16BIT, packed_bytes
from semisparse.formats.packed import PackedFormat
from semisparse.gemm import dispatch, problem
from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.ops import packing, products
from semisparse.ops.packing import _cuda_pack, _cuda_pack_tokens, _cuda_unpack, pack_pruned
from semisparse.ops.products import (
    _cuda_packed_matmul,
    _cuda_packed_tokens_grad_weight,
    _cuda_packed_tokens_matmul,
    multiply,
)
from semisparse.reference import masks
from semisparse.testing import assert_bit_equal, small_integers
from tests.gemm.simulated import make_engine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="here the CPU plays the device")
TOKENS = [0, 1, 7, 8, 13, 16, 40]
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def library(monkeypatch):
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    engine, library, _ = make_engine()
    tuner = Autotuner(engine, None, shipped=tuple)
    # The library's own format: its compressor writes it, and only its products read it.
    for module in (packing, products):
        monkeypatch.setattr(module, "packed_format", lambda *_: PackedFormat("compressor", None, "simulated"))
        monkeypatch.setattr(module, "engine", lambda: engine)
    monkeypatch.setattr(dispatch, "process_engine", lambda: engine)
    monkeypatch.setattr(dispatch, "autotuner", lambda: tuner)
    return library


def integers(*shape):
    return small_integers(shape, seed=sum(shape), dtype=DTYPE)


def shifted(tensor):
    """The same values at an address that is not a multiple of 16."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    view = memory[1:].view(tensor.shape)
    view.copy_(tensor)
    assert not tensor.numel() or view.data_ptr() % 16
    return view


def pruned(matrix):
    return torch.where(masks.transposable(matrix), matrix, 0)


def pruned_tokens(x, rows):
    return pruned(torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[0])))


@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_packed_weight_multiplies_any_number_of_tokens(library, tokens, backend):
    x, weight, bias = integers(tokens, 48), integers(32, 48), integers(32)
    packed, packed_t = _cuda_pack(weight, DTYPE, "transposable")
    assert (packed.numel(), packed_t.numel()) == (packed_bytes(32, 48), packed_bytes(48, 32))
    for given in (x, shifted(x), x.mT.contiguous().mT):
        for added in (None, bias, shifted(bias)):
            y = _cuda_packed_matmul(given, packed, added, 32, backend)
            exact = given.double() @ pruned(weight).double().mT + (0 if added is None else bias.double())
            assert_bit_equal(y + 0.0, exact.to(DTYPE) + 0.0)
    grad = integers(tokens, 32)
    exact = grad.double() @ pruned(weight).double()
    assert_bit_equal(_cuda_packed_matmul(grad, packed_t, None, 48, backend) + 0.0, exact.to(DTYPE) + 0.0)
    assert bool(library.products) == bool(tokens)  # dense: only to read the library's format


@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_packed_tokens_multiply_and_give_the_weight_gradient(tokens, backend):
    x, weight, bias, grad = integers(tokens, 48), integers(32, 48), integers(32), integers(tokens, 32)
    rows = -(-tokens // 16) * 16
    packed, packed_t = _cuda_pack_tokens(x, DTYPE)
    kept = pruned_tokens(x, rows)[:tokens].double()
    for added in (None, bias):
        for given in (weight, shifted(weight)):
            y = _cuda_packed_tokens_matmul(packed, given, added, tokens, backend)
            exact = kept @ weight.double().mT + (0 if added is None else bias.double())
            assert_bit_equal(y + 0.0, exact.to(DTYPE) + 0.0)
    for given in (grad, shifted(grad)):
        dw = _cuda_packed_tokens_grad_weight(packed_t, given, 48, backend)
        assert_bit_equal(dw + 0.0, (grad.double().mT @ kept).to(DTYPE) + 0.0)


def test_what_only_the_engine_can_read_is_unpacked_by_it():
    weight = integers(32, 48)
    packed, packed_t = _cuda_pack(weight, DTYPE, "transposable")
    assert_bit_equal(_cuda_unpack(packed, 32, 48, DTYPE) + 0.0, pruned(weight) + 0.0)
    assert_bit_equal(_cuda_unpack(packed_t, 48, 32, DTYPE) + 0.0, pruned(weight).mT.contiguous() + 0.0)


def two_of_four_e4m3(rows, columns):
    matrix = small_integers((rows, columns), seed=rows, dtype=torch.float32)
    return torch.where(masks.row(matrix), matrix, 0).to(FP8)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
def test_a_packed_e4m3_weight_multiplies_tokens_padded_to_16(library, backend, out_dtype):
    weight, x = two_of_four_e4m3(32, 96), integers(48, 96).to(FP8)
    packed = pack_pruned(weight, PackedFormat("compressor", None, "simulated"))
    assert packed.numel() == packed_bytes(32, 96, 1)
    out = torch.empty(48, 32, dtype=out_dtype)
    multiply(problem.fp8_forward(48, 32, 96, out_dtype), packed, x, out, None, backend)
    assert_bit_equal(out + 0.0, (x.double() @ weight.double().mT).to(out_dtype) + 0.0)
    assert library.products


@pytest.mark.parametrize(("packer", "layout"), [("compressor", None), ("reference", SM90_8BIT)])
def test_e4m3_packed_without_the_kernel_comes_back_exactly(monkeypatch, packer, layout):
    written = PackedFormat(packer, layout, "simulated")
    monkeypatch.setattr(packing, "packed_format", lambda *_: written)
    weight = two_of_four_e4m3(96, 160)
    packed = pack_pruned(weight, written)
    assert packed.numel() == packed_bytes(96, 160, 1)
    unpacked = _cuda_unpack(packed, 96, 160, FP8)
    assert unpacked.dtype is FP8
    assert_bit_equal(unpacked.float() + 0.0, weight.float() + 0.0)


@pytest.mark.parametrize("layout", [SM90_16BIT, None])
def test_without_an_engine_the_reference_packs_into_a_buffer_of_the_promised_size(monkeypatch, layout):
    monkeypatch.setattr(packing, "packed_format", lambda *_: PackedFormat("reference", layout, "simulated"))
    weight = integers(48, 80)
    for buffer, shape in zip(_cuda_pack(weight, DTYPE, "transposable"), ((48, 80), (80, 48)), strict=True):
        assert buffer.numel() == packed_bytes(*shape)
        if layout is not None:
            expected = pruned(weight) if shape == (48, 80) else pruned(weight).mT.contiguous()
            assert_bit_equal(_cuda_unpack(buffer, *shape, DTYPE), expected)
