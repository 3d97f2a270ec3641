"""Which packer a device gets, that it is found out once, and that anything but the fast one is said aloud."""

import logging
import warnings
from types import SimpleNamespace

import pytest
import torch

from semisparse.errors import EngineError
from semisparse.formats import packed as formats
from semisparse.formats.layout import FP8, SM90_8BIT, SM90_16BIT, MetadataLayout
from semisparse.formats.packed import packed_format
from semisparse.formats.probe import NotAPermutation

BF16 = torch.bfloat16


@pytest.fixture
def machine(monkeypatch):
    """A device 2 whose engine, layout and triton a test may exchange."""
    made = SimpleNamespace(ok=True, layout=SM90_16BIT, triton=True, capturing=False, probed=[])

    def discover(compress, dtype, *, device):
        assert device == torch.device("cuda", 2)
        made.probed.append((dtype, compress(torch.zeros(1, dtype=dtype))))
        return made.layout

    runtime = SimpleNamespace(capturing=lambda: made.capturing)
    engine = SimpleNamespace(
        available=lambda index: SimpleNamespace(ok=made.ok, reason="the driver is too old"),
        compress=lambda matrix: matrix.dtype,
        runtime=runtime,
    )
    monkeypatch.setattr(formats, "discover", discover)
    monkeypatch.setattr(formats, "find_spec", lambda name: name if made.triton else None)
    monkeypatch.setattr(formats, "_FORMATS", {})
    made.engine = engine
    return made


def test_the_kernel_packs_where_it_can_write_the_engines_layout(machine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = packed_format(2, BF16, machine.engine)
    assert (found.packer, found.layout, found.reason) == (
        "kernel",
        SM90_16BIT,
        "layout verified against NVIDIA's compressor",
    )


def test_what_was_found_is_logged(machine, caplog):
    caplog.set_level(logging.INFO, "semisparse")
    packed_format(2, BF16, machine.engine)
    assert "torch.bfloat16 on device 2: packed by the Triton kernel; layout verified" in caplog.text


def test_each_dtype_is_probed_once(machine):
    assert packed_format(2, BF16, machine.engine) is packed_format(2, BF16, machine.engine)
    packed_format(2, torch.float16, machine.engine)
    assert machine.probed == [(BF16, BF16), (torch.float16, torch.float16)]


def test_e4m3_is_probed_as_bytes_that_the_engine_takes_for_e4m3(machine):
    machine.layout = SM90_8BIT
    found = packed_format(2, FP8, machine.engine)
    assert (found.packer, found.layout) == ("kernel", SM90_8BIT)
    assert machine.probed == [(torch.uint8, FP8)]
    assert packed_format(2, FP8, machine.engine) is found


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (NotAPermutation("two addresses hold one group"), "layout unknown: two addresses hold one group"),
        (MetadataLayout((*range(7), 32)), "the kernel cannot write blocks of 128 rows x 2 groups"),
        (MetadataLayout((0, *range(32, 37))), "the kernel cannot write blocks of 2 rows x 32 groups"),
    ],
)
def test_the_compressor_packs_where_the_kernel_cannot_with_one_warning(machine, layout, reason):
    machine.layout = layout
    with pytest.warns(RuntimeWarning, match=f"packing on device 2 is slow, by compressor.*{reason}") as caught:
        found = packed_format(2, BF16, machine.engine)
    assert (found.packer, found.layout) == ("compressor", layout if isinstance(layout, MetadataLayout) else None)
    assert len(caught) == 1
    assert packed_format(2, BF16, machine.engine) is found  # and no second warning, which would be an error here


def test_the_largest_blocks_that_a_program_holds_are_the_kernels(machine):
    machine.layout = MetadataLayout((*range(6), *range(32, 36)))
    assert packed_format(2, BF16, machine.engine).packer == "kernel"


@pytest.mark.parametrize(("ok", "packer"), [(True, "compressor"), (False, "reference")])
def test_without_triton_it_is_said_who_packs(machine, ok, packer):
    machine.triton, machine.ok = False, ok
    with pytest.warns(RuntimeWarning, match=f"by {packer} instead of the Triton kernel: triton is not installed"):
        assert packed_format(2, BF16, machine.engine).packer == packer


@pytest.mark.parametrize(("dtype", "layout"), [(BF16, SM90_16BIT), (FP8, SM90_8BIT)], ids=str)
def test_without_an_engine_the_kernel_writes_the_layout_of_sm90_and_nothing_is_probed(machine, dtype, layout):
    machine.ok = False
    found = packed_format(2, dtype, machine.engine)
    assert (found.packer, found.layout, machine.probed) == ("kernel", layout, [])
    assert found.reason == "no sparse engine: the driver is too old"


def test_under_capture_only_what_is_known_is_answered(machine):
    machine.capturing = True
    with pytest.raises(
        EngineError, match=r"nothing of torch\.bfloat16 was packed on device 2 yet.*run one step before"
    ):
        packed_format(2, BF16, machine.engine)
    assert machine.probed == []
    machine.capturing = False
    known = packed_format(2, BF16, machine.engine)
    machine.capturing = True
    assert packed_format(2, BF16, machine.engine) is known
