"""The engine on the simulated library: products, bad operands, errors of the library, compressing."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from semisparse.errors import EngineError, ShapeError, TensorError
from semisparse.formats.layout import PADDING, lengthened, packed_bytes
from semisparse.gemm import problem as problems
from semisparse.gemm.operands import Operands
from tests.gemm import simulated
from tests.gemm.simulated import FORWARD, PRODUCTS, SimulatedLibrary, exact, make_engine, operands, run, two_of_four

BF16 = torch.bfloat16

# ---- products


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("workspace", [0, 96])
def test_each_product_is_described_so_that_the_library_computes_it(name, workspace):
    engine, library, runtime = make_engine(SimulatedLibrary(workspace=workspace))
    run(engine, PRODUCTS[name], algorithm=3)
    assert library.products == [3]
    assert library.streams == [runtime.stream(-1)]
    assert all(bool(address) == bool(workspace) for address in library.workspaces)


@pytest.mark.parametrize("follows_bias", [True, False])
@pytest.mark.parametrize("capturing", [True, False])
def test_each_call_adds_its_own_bias_whether_or_not_a_plan_can_be_rebound(follows_bias, capturing):
    engine, library, runtime = make_engine(SimulatedLibrary(follows_bias=follows_bias))
    problem = PRODUCTS["forward with bias"]
    a, b, out, bias = operands(problem)
    packed = engine.compress(a)
    runtime.is_capturing = capturing
    for step in range(4):
        moved = bias + step
        engine.matmul(problem, 0, Operands(packed, b, out, moved))
        assert torch.equal(out, exact(problem, a, b, moved))
    assert engine.plan_count(-1) == 1
    built = sum(kind == "plan" for kind, _ in library.log) + 1
    assert (built <= 2) == (follows_bias and not capturing)  # one, and one for the try


def test_the_current_stream_is_read_at_each_call():
    engine, library, runtime = make_engine()
    run(engine, FORWARD)
    runtime.stream = lambda index: 4242
    run(engine, FORWARD)
    assert library.streams == [6_999, 4242]


def test_the_device_is_made_current_for_a_call_and_restored_even_after_an_error():
    engine, library, runtime = make_engine()
    runtime.device_now = 5
    run(engine, FORWARD)
    assert runtime.device_now == 5
    assert -1 in runtime.exchanges
    library.faults[1] = lambda out: (_ for _ in ()).throw(library.cuSPARSELtError(10))
    with pytest.raises(EngineError):
        run(engine, FORWARD, algorithm=1)
    assert runtime.device_now == 5


def test_no_tensor_is_kept():
    engine, _, _ = make_engine(SimulatedLibrary(workspace=64))
    problem = PRODUCTS["forward with bias"]
    a, b, out, bias = operands(problem)
    packed = engine.compress(a)
    engine.matmul(problem, 0, Operands(packed, b, out, bias))
    watched = [weakref.ref(tensor) for tensor in (packed, b, out, bias)]
    del packed, b, out, bias
    gc.collect()
    assert [reference() for reference in watched] == [None] * 4


# ---- bad operands


def spoiled(name: str, how: str) -> dict[str, torch.Tensor | None]:
    """Operands of the biased forward problem with one of them spoiled."""
    problem = PRODUCTS["forward with bias"]
    a, b, out, bias = operands(problem)
    given = {"packed": make_engine()[0].compress(a), "b": b, "out": out, "bias": bias}
    tensor = given[name]
    given[name] = {
        "short": lambda: tensor[:-1].clone(),
        "long": lambda: torch.cat([tensor, tensor[:1]]),
        "dtype": lambda: tensor.to(torch.float32) if name != "packed" else tensor.view(torch.int8),
        "stride": lambda: torch.stack([tensor, tensor], dim=-1)[..., 0],
        "shift": lambda: torch.cat([tensor.flatten(), tensor.flatten()])[1 : 1 + tensor.numel()].view(tensor.shape),
        "missing": lambda: None,
    }[how]()
    return given


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for name in ("packed", "b", "out", "bias")
        for how in ("short", "long", "dtype", "stride", "shift")
        if (name, how) != ("packed", "long")
    ],
)
def test_an_operand_that_does_not_fit_is_an_error_and_never_read(name, how):
    engine, library, _ = make_engine()
    given = spoiled(name, how)
    wrong_size = how in ("short", "long")
    with pytest.raises(ShapeError if wrong_size else TensorError, match=rf"^{name} "):
        engine.matmul(PRODUCTS["forward with bias"], 0, Operands(**given))
    assert library.products == []
    run(engine, PRODUCTS["forward with bias"])  # nothing wrong was left behind


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device than the CPU, which is index -1 here."""

    device = torch.device("cuda", 5)

    def get_device(self):
        return 5


@pytest.mark.parametrize("name", ["packed", "b", "bias"])
def test_an_operand_on_another_device_is_an_error_and_never_read(name):
    engine, library, _ = make_engine()
    given = spoiled("bias", "long") | {"bias": operands(PRODUCTS["forward with bias"])[3]}
    given[name] = given[name].as_subclass(Elsewhere)
    with pytest.raises(TensorError, match=rf"^{name} is on cuda:5, out on cpu; move both to one device"):
        engine.matmul(PRODUCTS["forward with bias"], 0, Operands(**given))
    assert library.products == []


def test_bytes_behind_a_packed_matrix_are_allowed_and_change_nothing():
    engine, _, _ = make_engine()
    problem = PRODUCTS["forward with bias"]
    a, b, out, bias = operands(problem)
    packed = lengthened(engine.compress(a), problem.rows, problem.reduction)
    engine.matmul(problem, 0, Operands(torch.cat([packed, torch.full_like(packed[:64], 255)]), b, out, bias))
    assert torch.equal(out, exact(problem, a, b, bias))


def test_a_missing_and_an_unasked_bias_are_errors_and_leave_no_plan():
    engine, library, _ = make_engine()
    with pytest.raises(TensorError, match="bias=None"):
        engine.matmul(PRODUCTS["forward with bias"], 0, Operands(**spoiled("bias", "missing")))
    a, b, out, _ = operands(FORWARD)
    with pytest.raises(TensorError, match=r"bias=\(32,\)"):
        engine.matmul(FORWARD, 0, Operands(engine.compress(a), b, out, torch.zeros(32, dtype=BF16)))
    assert library.products == []
    assert engine.plan_count(-1) == 0


def test_sizes_the_library_cannot_take_are_refused_before_it_is_asked():
    engine, library, _ = make_engine()
    problem = replace(FORWARD, columns=20)
    _, b, out, _ = operands(problem)
    with pytest.raises(EngineError, match="columns=20 is not a multiple of 8; use the masked-dense"):
        engine.matmul(problem, 0, Operands(torch.zeros(1, dtype=torch.uint8), b, out))
    assert not any(kind == "matmul" for kind, _ in library.live.values())


@pytest.mark.parametrize(
    ("name", "dtype"), [("b", BF16), ("out", torch.float32), ("out", torch.float8_e4m3fn)], ids=str
)
def test_an_fp8_product_takes_e4m3_and_writes_what_the_problem_says(name, dtype):
    engine, library, _ = make_engine()
    problem = PRODUCTS["fp8_forward"]
    a, b, out, _ = operands(problem)
    given = {"packed": engine.compress(a), "b": b, "out": out}
    given[name] = given[name].to(dtype)
    with pytest.raises(TensorError, match=rf"^{name} has dtype {dtype}; .* needs "):
        engine.matmul(problem, 0, Operands(**given))
    assert library.products == []


def test_an_fp8_product_with_a_row_major_operand_is_refused_before_the_library_is_asked():
    engine, library, _ = make_engine()
    problem = replace(PRODUCTS["fp8_forward"], b_order="row")
    a, b, out, _ = operands(problem)
    packed, made = engine.compress(a), library.made
    with pytest.raises(EngineError, match="b_order='row' is not 'column', as 8-bit types need it; use the masked"):
        engine.matmul(problem, 0, Operands(packed, b, out))
    assert library.made == made


# ---- errors of the library


@pytest.mark.parametrize("kind", ["handle", "matrix", "matmul", "selection", "plan"])
def test_a_refusal_while_a_plan_is_made_is_an_engine_error_and_leaks_nothing(kind):
    engine, library, _ = make_engine()
    packed = engine.compress(two_of_four(32, 48, BF16))
    engine.close()
    _, b, out, _ = operands(FORWARD)
    library.refuse[kind] = 10
    with pytest.raises(EngineError, match=r"CUSPARSE_STATUS_NOT_SUPPORTED, status 10.*backend='dense'"):
        engine.matmul(FORWARD, 0, Operands(packed, b, out))
    library.refuse.clear()
    assert {kind for kind, _ in library.live.values()} <= {"handle"}
    run(engine, FORWARD)


def test_an_unknown_algorithm_is_an_engine_error_that_names_it():
    engine, _, _ = make_engine()
    with pytest.raises(EngineError, match=r"algorithm=99 is not offered for 32x48.*the ids are 0 to 5"):
        run(engine, FORWARD, algorithm=99)


def test_a_status_without_a_name_is_still_reported():
    engine, library, _ = make_engine()
    library.refuse["plan"] = 77
    with pytest.raises(EngineError, match="status 77"):
        run(engine, FORWARD)


def test_a_plan_that_cannot_be_freed_is_warned_of_and_the_product_stands():
    engine, library, _ = make_engine()
    engine.MAX_PLANS = 1
    run(engine, FORWARD, algorithm=0)
    library.refuse["destroy selection"] = 10
    with pytest.warns(RuntimeWarning, match="leaks host memory"):
        run(engine, FORWARD, algorithm=1)
    assert sum(kind == "matrix" for kind, _ in library.live.values()) == 3  # the rest of the old plan was freed


# ---- compressing


def test_compress_checks_the_pattern_unless_told_not_to():
    engine, library, _ = make_engine()
    compress, given = library.sp_mma_compress2, []
    library.sp_mma_compress2 = lambda *arguments: given.append(arguments)
    dense = torch.ones(16, 16, dtype=BF16)
    with pytest.raises(ShapeError, match=r"dense \(16, 16\) keeps more than 2 of 4 in a group: prune it first"):
        engine.compress(dense)
    assert given == []
    engine.compress(dense, check=False)
    assert len(given) == 1
    library.sp_mma_compress2 = compress
    assert engine.compress(two_of_four(16, 16, BF16)).dtype == torch.uint8


@pytest.mark.usefixtures("poison")
def test_bytes_that_the_compressor_leaves_out_are_padding_and_memory_goes_on_with_it():
    engine, library, _ = make_engine()
    library.sp_mma_compress2 = lambda *arguments: None
    packed = engine.compress(two_of_four(16, 16, BF16))
    whole = torch.empty(0, dtype=torch.uint8).set_(packed.untyped_storage())
    assert whole.numel() == packed_bytes(16, 16) > packed.numel()
    assert bool((whole == PADDING).all())


@pytest.mark.parametrize(
    ("dense", "error"),
    [
        (torch.zeros(16, 16), TensorError),
        (torch.zeros(16, 24, dtype=BF16), ShapeError),
        (torch.zeros(0, 16, dtype=BF16), ShapeError),
        (torch.zeros(2, 16, 16, dtype=BF16), ShapeError),
        (torch.zeros(16, 32, dtype=BF16)[:, ::2], TensorError),
        (torch.zeros(16 * 16 + 1, dtype=BF16)[1:].view(16, 16), TensorError),
        (torch.zeros(32, 48, dtype=torch.float8_e4m3fn), ShapeError),
        (torch.zeros(32, 32, dtype=torch.float8_e5m2), TensorError),
        (torch.zeros(32, 32, dtype=torch.uint8), TensorError),
    ],
)
def test_compress_refuses_what_the_library_would_misread(dense, error):
    engine, library, _ = make_engine()
    with pytest.raises(error, match="dense"):
        engine.compress(dense)
    assert library.made == 0


def test_algorithms_that_would_end_the_process_are_not_offered(monkeypatch):
    monkeypatch.setattr(simulated, "ALGORITHMS", 52)
    engine, _, _ = make_engine()
    assert engine.algorithms(problems.forward(8, 32, 32, torch.float16), -1) == range(36)


def test_packed_bytes_and_algorithms_leave_nothing_behind():
    engine, library, _ = make_engine()
    assert engine.packed_bytes(32, 48, BF16, -1) == engine.compress(two_of_four(32, 48, BF16)).numel()
    e4m3 = two_of_four(32, 96, torch.float8_e4m3fn)
    assert engine.packed_bytes(32, 96, e4m3.dtype, -1) == engine.compress(e4m3).numel() == 32 * 96 * 5 // 8
    assert engine.algorithms(FORWARD, -1) == range(6)
    assert {kind for kind, _ in library.live.values()} == {"handle"}


def test_tensors_on_the_host_are_refused_where_the_engine_drives_a_gpu():
    engine, library, runtime = make_engine()
    a, b, out, _ = operands(FORWARD)
    packed = engine.compress(a)
    runtime.kind, runtime.device_now = "cuda", 0
    with pytest.raises(TensorError, match="out is on cpu; sparse products need tensors on a CUDA device"):
        engine.matmul(FORWARD, 0, Operands(packed, b, out))
    assert library.products == []
