"""The decoder in the style of Llama."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semisparse.errors import ConfigError, ShapeError
from semisparse_lab.models.llama import LlamaConfig, RMSNorm, build_llama, rotated, rotations

TINY = LlamaConfig(vocabulary=32, context=8, width=16, hidden=24, depth=2, heads=2)


def test_a_token_sees_itself_and_those_before_it_alone() -> None:
    model = build_llama(TINY, 0)
    tokens = torch.arange(8)[None]
    changed = tokens.clone()
    changed[0, 5] = 31
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert all(not torch.equal(before[:, place], after[:, place]) for place in range(5, 8))


def test_a_rotated_product_depends_on_the_distance_of_two_positions_alone() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(8, dtype=torch.float64).expand(1, 6, 1, 8) for _ in range(2))
    turns = rotations(6, 8).double()

    def turned(x: torch.Tensor) -> torch.Tensor:
        cosine, sine = turns[:, None].unbind(dim=2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

    torch.testing.assert_close(rotated(q.float(), rotations(6, 8)), turned(q).float())
    products = torch.einsum("bqhf,bkhf->qk", turned(q), turned(k))
    for distance in range(5):
        along = products.diagonal(distance).float()
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert not torch.allclose(products[0, 0], products[0, 3])


def test_the_norm_is_that_of_torch() -> None:
    x, norm = torch.randn(3, 16), RMSNorm(16)
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-5))


def test_weights_depend_on_the_seed_alone() -> None:
    first, again, other = build_llama(TINY, 1), build_llama(TINY, 1), build_llama(TINY, 2)
    torch.randn(1)
    for one, two in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert first.head.weight is not first.token_embed.weight


def test_multiplications_are_those_of_the_linear_layers() -> None:
    sizes = {name: module.weight.numel() for name, module in build_llama(TINY, 0).named_modules()
             if isinstance(module, nn.Linear)}  # fmt: skip
    said = TINY.multiplications()
    assert said["head"] == sizes.pop("head") and said["block_linears"] == sum(sizes.values())
    large = LlamaConfig().multiplications()
    assert large["block_linears"] / sum(large.values()) > 0.85


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="width=10"):
        LlamaConfig(width=10, heads=2)
    with pytest.raises(ShapeError, match=r"\(1, 9\)"):
        build_llama(TINY, 0)(torch.zeros(1, 9, dtype=torch.long))
