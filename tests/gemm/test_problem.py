import pickle

import pytest
import torch

from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import FP8
from semisparse.gemm import problem as problems
from semisparse.gemm.problem import Problem, bucket_of
from tests import fresh

BF16 = torch.bfloat16
CONSTRUCTORS = [
    problems.forward,
    problems.grad_input,
    problems.activation_forward,
    problems.activation_weight,
    problems.sampled_weight,
]


FP8_CONSTRUCTORS = [problems.fp8_forward, problems.fp8_grad_input, problems.fp8_sampled_weight]


def operands(kind, tokens: int, n: int, k: int):
    """x, weight and grad_output of a layer as the products see them: (A, tensor of B, tensor of D) in fp64."""
    x, weight, grad = (torch.randn(*shape, dtype=torch.float64) for shape in ((tokens, k), (n, k), (tokens, n)))
    return {
        problems.forward: (weight, x, x @ weight.mT),
        problems.grad_input: (weight.mT, grad, grad @ weight),
        problems.fp8_forward: (weight, x, x @ weight.mT),
        problems.fp8_grad_input: (weight.mT, grad, grad @ weight),
        problems.activation_forward: (x, weight, x @ weight.mT),
        problems.activation_weight: (x.mT, grad, grad.mT @ x),
        problems.sampled_weight: (grad.mT, x, grad.mT @ x),
        problems.fp8_sampled_weight: (grad.mT, x.mT, grad.mT @ x),
    }[kind]


@pytest.mark.parametrize("kind", CONSTRUCTORS + FP8_CONSTRUCTORS)
def test_a_constructor_describes_the_product_it_names(kind):
    tokens = 64 if kind is problems.fp8_sampled_weight else 48
    a, b, d = operands(kind, tokens, 32, 80)
    made = kind(tokens, 32, 80, BF16)
    assert (made.rows, made.reduction) == a.shape
    assert made.b_shape == b.shape
    assert made.d_shape == d.shape
    product = a @ (b if made.b_order == "row" else b.mT)
    torch.testing.assert_close(product if made.d_order == "row" else product.mT, d)
    assert made.tokens == tokens


@pytest.mark.parametrize(("kind", "multiple"), list(zip(CONSTRUCTORS, (8, 8, 16, 16, 16), strict=True)))
def test_token_counts_are_padded_to_what_the_engine_takes(kind, multiple):
    for tokens in range(1, 70):
        made = kind(tokens, 32, 48, BF16)
        assert made.refusal() is None
        assert 0 <= made.tokens - tokens < multiple
        assert made.tokens % multiple == 0


def test_only_the_forward_product_has_a_bias():
    assert problems.forward(8, 16, 32, BF16, bias=True).bias
    assert not any(kind(8, 16, 32, BF16).bias for kind in CONSTRUCTORS)


@pytest.mark.parametrize("out_dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", FP8_CONSTRUCTORS)
def test_fp8_products_have_tokens_padded_and_say_what_they_write(kind, out_dtype):
    multiple = 32 if kind is problems.fp8_sampled_weight else 16
    for tokens in range(1, 70):
        made = kind(tokens, 32, 96, out_dtype)
        assert made.refusal() is None
        assert made.tokens == -(-tokens // multiple) * multiple
        assert (made.dtype, made.out_dtype, made.bias) == (FP8, out_dtype, False)
        assert made.bucket.out_dtype is out_dtype and made.bucket.refusal() is None


def test_sixteen_bit_products_write_their_own_dtype():
    assert all(kind(8, 16, 32, BF16).out_dtype is BF16 for kind in CONSTRUCTORS)
    assert Problem(16, 32, 8, BF16, out_dtype=BF16) == Problem(16, 32, 8, BF16)


@pytest.mark.parametrize("kind", CONSTRUCTORS)
def test_equal_arguments_give_the_identical_object(kind):
    assert kind(24, 32, 48, BF16) is kind(24, 32, 48, BF16)


def test_equality_and_hash_follow_every_field():
    base = {"rows": 16, "reduction": 32, "columns": 8, "dtype": BF16}
    other = {"rows": 32, "reduction": 16, "columns": 16, "dtype": torch.float16, "b_order": "row"}
    other |= {"d_order": "row", "bias": True, "token_axis": "rows"}
    same = Problem(**base)
    assert same == Problem(**base)
    assert hash(same) == hash(Problem(**base))
    for name, value in other.items():
        assert Problem(**base | {name: value}) != same, name
    assert problems.fp8_forward(16, 32, 32, BF16) != problems.fp8_forward(16, 32, 32, torch.float32)


@pytest.mark.parametrize(
    "call", ["forward(24, 32, 48, torch.bfloat16, True)", "fp8_forward(24, 32, 96, torch.float32)"]
)
def test_a_pickled_problem_is_found_in_another_process(call):
    made = eval(f"problems.{call}")
    assert pickle.loads(pickle.dumps(made)) == made
    code = (
        "import pickle, sys, torch\n"
        "from semisparse.gemm import problem as problems\n"
        "sent = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        f"assert {{problems.{call}: 1}}[sent] == 1\n"
    )
    done = fresh.run("-c", code, pickle.dumps(made).hex())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"rows": 24}, "rows=24"),
        ({"reduction": 8}, "reduction=8"),
        ({"columns": 12}, "columns=12"),
        ({"rows": 4, "columns": 1}, "rows=4 is not a multiple of 16, columns=1 is not a multiple of 8"),
    ],
)
def test_sizes_the_engine_cannot_take_are_named(change, refused):
    sizes = {"rows": 16, "reduction": 16, "columns": 8} | change
    assert refused in str(Problem(**sizes, dtype=BF16).refusal())


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"rows": 48}, "rows=48 is not a multiple of 32"),
        ({"reduction": 16}, "reduction=16 is not a multiple of 32"),
        ({"columns": 24}, "columns=24 is not a multiple of 16"),
        ({"b_order": "row"}, "b_order='row' is not 'column', as 8-bit types need it"),
    ],
)
def test_fp8_products_the_engine_cannot_take_are_named(change, refused):
    fields = {"rows": 32, "reduction": 64, "columns": 16, "dtype": FP8, "out_dtype": BF16}
    assert Problem(**fields).refusal() is None
    assert Problem(**fields | {"d_order": "row"}).refusal() is None
    assert Problem(**fields | change).refusal() == refused


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"rows": 0}, ShapeError, "rows=0"),
        ({"columns": -8}, ShapeError, "columns=-8"),
        ({"reduction": 16.0}, ShapeError, "reduction=16.0"),
        ({"rows": True}, ShapeError, "rows=True"),
        ({"dtype": torch.float32}, TensorError, "float32"),
        ({"b_order": "col"}, ConfigError, "b_order='col'"),
        ({"d_order": None}, ConfigError, "d_order=None"),
        ({"token_axis": "tokens"}, ConfigError, "token_axis='tokens'"),
        ({"out_dtype": torch.float32}, TensorError, "out_dtype=torch.float32 is no result of torch.bfloat16"),
        ({"dtype": FP8}, TensorError, "out_dtype=torch.float8_e4m3fn .* use torch.bfloat16 or torch.float32"),
        ({"dtype": FP8, "out_dtype": torch.float16}, TensorError, "out_dtype=torch.float16"),
        ({"dtype": FP8, "out_dtype": BF16, "bias": True}, ConfigError, "bias=True.*add it after scaling"),
        ({"dtype": torch.float8_e5m2}, TensorError, "float8_e5m2"),
    ],
)
def test_bad_fields_are_refused_by_name(change, error, named):
    with pytest.raises(error, match=named):
        Problem(**{"rows": 16, "reduction": 16, "columns": 8, "dtype": BF16} | change)


def test_the_text_of_a_problem_names_what_it_writes_where_that_differs():
    assert str(problems.forward(8, 16, 32, BF16)).endswith("into column-major, bfloat16")
    assert str(problems.fp8_forward(8, 32, 32, BF16)).endswith("into column-major, float8_e4m3fn -> bfloat16")


def test_an_empty_product_is_refused_with_the_way_out():
    with pytest.raises(ShapeError, match="return early"):
        problems.forward(0, 16, 16, BF16)


def test_buckets_are_few_close_and_stable():
    buckets = [bucket_of(tokens) for tokens in range(1, 100_001)]
    assert all(tokens <= bucket <= tokens * 1.25 for tokens, bucket in enumerate(buckets, 1))
    assert all(bucket_of(bucket) == bucket for bucket in set(buckets))
    assert buckets == sorted(buckets)
    assert len(set(buckets)) <= 4 * 17  # four for each doubling, 17 doublings up to 100,000
    assert bucket_of(13008) == 14336
    assert bucket_of(16384) == 16384


@pytest.mark.parametrize("kind", CONSTRUCTORS)
def test_a_bucket_changes_the_tokens_only_and_is_a_legal_problem(kind):
    for tokens in (1, 200, 13008, 16384, 44160):
        made = kind(tokens, 4096, 1024, BF16)
        bucket = made.bucket
        assert bucket.tokens == bucket_of(made.tokens)
        assert bucket.refusal() is None
        sizes = {"rows", "reduction", "columns"} - {made.token_axis}
        assert all(getattr(bucket, name) == getattr(made, name) for name in sizes)
        assert (bucket.b_order, bucket.d_order, bucket.token_axis) == (made.b_order, made.d_order, made.token_axis)
        assert bucket.bucket == bucket
