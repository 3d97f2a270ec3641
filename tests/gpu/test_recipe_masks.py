"""Masks of recipes on a GPU: the CPU's masks bit for bit, exact products, and captured steps that see a refresh."""

import pytest
import torch
import torch.nn.functional as F

import semisparse
from semisparse import SemiSparseLinear, SparseConfig, ops
from semisparse.reference import linear, masks
from semisparse.testing import assert_as_good_as_torch, assert_bit_equal, small_integers
from tests.support import MaskArguments

# PyTorch starts each pool of graphs with an empty one, and warns of it. The second: a cuBLAS product as the first CUDA
# call of its autograd thread.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current"),
]

CHOSEN = ("transposable", "row", "greedy", "signed_greedy")
ALL = (*CHOSEN, "codes", "soft")
SETTINGS = ("greedy", "signed_greedy", "soft", "codes")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
SHAPE = (336, 1008)  # rows and columns that are not multiples of a program's block
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0]


@pytest.fixture(autouse=True)
def no_tuning(monkeypatch):
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")


def matrices(dtype, special=True):
    """Random numbers, ties, and values that are not numbers; a transposed matrix last."""
    found = [torch.randn(SHAPE), torch.randint(-3, 4, SHAPE)]
    if special:
        found.append(torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), SHAPE)])
    return [matrix.to(dtype).cuda() for matrix in [*found, torch.randn(SHAPE[::-1]).mT]]


def arguments_for(setting, shape=SHAPE, seed=3):
    """The mask, with tile codes of another matrix for "codes" and a scale for "soft"; on the CPU."""
    if setting == "soft":
        return MaskArguments("soft", scale=torch.tensor(1.0 + seed / 16))
    if setting == "codes":
        other = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return MaskArguments("transposable", ops.tile_codes(other, "transposable"))
    return MaskArguments(setting)


@EVERY_DTYPE
@pytest.mark.parametrize("mask", CHOSEN)
def test_tile_codes_are_the_cpu_codes_bit_for_bit(mask, dtype):
    for matrix in matrices(dtype):
        assert_bit_equal(ops.tile_codes(matrix, mask).cpu(), ops.tile_codes(matrix.cpu(), mask))


@EVERY_DTYPE
@pytest.mark.parametrize("mask", ALL)
def test_prune_is_the_cpus_bit_for_bit(mask, dtype):
    given = arguments_for(mask)
    for matrix in matrices(dtype):
        for out in (dtype, torch.bfloat16):
            found = ops.prune(matrix, out, *given.to("cuda"))
            assert_bit_equal(found.cpu(), ops.prune(matrix.cpu(), out, *given))


@EVERY_DTYPE
@pytest.mark.parametrize("mask", ALL)
@pytest.mark.parametrize("packed_as", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_unpacking_what_was_packed_is_pruning_on_the_cpu(packed_as, mask, dtype):
    given = arguments_for(mask)
    for matrix in matrices(dtype, special=False):
        expected = ops.prune(matrix.cpu(), packed_as, *given)
        packed, packed_t = ops.pack(matrix, packed_as, *given.to("cuda"))
        assert_bit_equal(ops.unpack(packed, *SHAPE, packed_as).cpu(), expected)
        if mask in ("row", "soft"):
            assert packed_t.numel() == 0
        else:
            assert_bit_equal(ops.unpack(packed_t, *SHAPE[::-1], packed_as).cpu(), expected.mT.contiguous())


def test_fp64_goes_through_the_reference_and_gives_the_same():
    matrix = torch.randn(64, 64, dtype=torch.float64)
    for mask in CHOSEN:
        assert_bit_equal(ops.tile_codes(matrix.cuda(), mask).cpu(), ops.tile_codes(matrix, mask))


def layer_of(setting, weight, bias, backend="cusparselt"):
    """A layer on the GPU with copies of weight and bias and, where the setting asks for it, something held."""
    given = arguments_for(setting, tuple(weight.shape)).to("cuda")
    config = SparseConfig(weight=given.mask, backend=backend)
    layer = SemiSparseLinear(weight.shape[1], weight.shape[0], device="cuda", dtype=weight.dtype, config=config)
    layer.load_state_dict({"weight": weight, "bias": bias})
    layer.hold(**given.held)
    return layer


def pruned_by(layer, dtype):
    """The layer's weight as the reference prunes it, computed in dtype."""
    weight, mask = layer.weight.detach(), layer.sparse_config.weight
    if mask == "soft":
        return linear.soft_threshold(weight.to(dtype), layer.held_scale)
    if layer.held_codes is not None:
        kept = masks.from_codes(layer.held_codes)
    else:
        kept = masks.row(weight) if mask == "row" else masks.greedy(weight, signed=mask == "signed_greedy")
    return linear.prune(weight, kept).to(dtype)


def plain(layer, x, grad, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, pruned_by(layer, dtype), layer.bias)]
    y = F.linear(*leaves)
    y.backward(grad.to(dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def ours(layer, x, grad):
    layer.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]


@pytest.mark.parametrize("setting", [*SETTINGS, "row"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("tokens", "features"), [(0, (48, 80)), (13, (48, 80)), (200, (1024, 256))], ids=str)
def test_a_layer_errs_at_most_twice_as_much_as_torch(tokens, features, dtype, setting):
    in_features, out_features = features
    shapes = ((out_features, in_features), (out_features,), (tokens, in_features), (tokens, out_features))
    weight, bias, x, grad = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    layer = layer_of(setting, weight, bias)
    expected = plain(layer, x, grad, dtype), plain(layer, x, grad, torch.float64)
    for result, same_dtype, exact in zip(ours(layer, x, grad), *expected, strict=True):
        assert_as_good_as_torch(result, same_dtype, exact)


def network(setting, backend):
    """Two layers with small whole numbers for weights, the same at every call."""
    sizes, dtype = ((512, 256), (256, 512)), torch.bfloat16
    made = []
    for seed, shape in enumerate(sizes):
        weight = small_integers(shape, seed=seed, limit=9, dtype=dtype, device="cuda")
        bias = small_integers(shape[:1], seed=seed + 5, dtype=dtype, device="cuda")
        made.append(layer_of(setting, weight / 64, bias / 8, backend))
    return torch.nn.Sequential(made[0], torch.nn.ReLU(), made[1])


def step_of(net, x):
    """A whole optimizer step, ready to be captured; warmed up on another stream, as capture asks for."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, capturable=True, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = net(x).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    return step


def captured(step):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return graph, loss


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
def test_a_captured_step_equals_eager_and_sees_what_is_refreshed(backend, setting):
    nets = [network(setting, backend) for _ in range(2)]
    x = torch.randn(208, 256, device="cuda", dtype=torch.bfloat16)
    steps = [step_of(net, x) for net in nets]
    graph, loss = captured(steps[0])
    for turn in range(8):
        x.normal_()
        if turn % 3 == 2:  # in place, between replays, as a recipe's schedule does
            for net in nets:
                refresh(net, setting, seed=turn)
        graph.replay()
        assert_bit_equal(loss.detach(), steps[1]().detach())
    for replayed, eager in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert_bit_equal(replayed.detach(), eager.detach())


def refresh(net, setting, seed):
    for layer in (net[0], net[2]):
        fresh = arguments_for(setting, tuple(layer.weight.shape), seed)
        for held, tensor in ((layer.held_codes, fresh.codes), (layer.held_scale, fresh.scale)):
            if held is not None:
                held.copy_(tensor)


@pytest.mark.parametrize("setting", ["soft", "codes"])
@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
def test_a_replay_reads_what_is_held_then(backend, setting):
    net = network(setting, backend)
    x = small_integers((64, 256), seed=7, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        net(x)  # probes the engine, which capture does not allow
        torch.cuda.synchronize()
        graph, y = captured(lambda: net(x))
        graph.replay()
        before = y.clone()
        refresh(net, setting, seed=8)
        graph.replay()
        assert_bit_equal(y, net(x))
        assert not torch.equal(y, before)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("mask", ALL)
def test_nothing_waits_for_the_device(mask):
    matrix, given = torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16), arguments_for(mask).to("cuda")

    def call():
        if mask in CHOSEN:
            ops.tile_codes(matrix, mask)
        ops.prune(matrix, torch.bfloat16, *given)
        ops.pack(matrix, torch.bfloat16, *given)

    call()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("setting", SETTINGS)
def test_reuse_packs_what_is_held(setting):
    net = network(setting, "cusparselt")
    x = small_integers((64, 256), seed=7, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        for block in range(3):
            refresh(net, setting, seed=block)
            expected = net(x)
            with semisparse.reuse_packed(net) as packed:
                assert packed == 2
                for _ in range(2):
                    assert_bit_equal(net(x), expected)
