import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lab.tests.toys import MODEL
from semisparse.errors import ConfigError, ShapeError
from semisparse_lab.data.images import DATA_NAMES
from semisparse_lab.models.vit import VisionTransformer, ViTConfig, build_model
from semisparse_lab.studies.three_runs import preset


def by_hand(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """The model's formula written out, with explicit patches and softmax."""
    config, weights = model.config, dict(model.named_parameters())

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    p, side = config.patch_size, config.image_size // config.patch_size
    patches = torch.stack(
        [images[:, :, p * i : p * i + p, p * j : p * j + p].flatten(1) for i in range(side) for j in range(side)], dim=1
    )
    x = linear("patch_embed", patches) + weights["positions"]
    for block in range(config.depth):
        prefix = f"blocks.{block}"
        size = config.width // config.heads
        q, k, v = linear(f"{prefix}.attn.qkv", norm(f"{prefix}.norm1", x)).split(config.width, dim=-1)
        heads = []
        for head in range(config.heads):
            part = slice(head * size, head * size + size)
            attention = (q[..., part] @ k[..., part].transpose(1, 2) / size**0.5).softmax(dim=-1)
            heads.append(attention @ v[..., part])
        x = x + linear(f"{prefix}.attn.proj", torch.cat(heads, dim=-1))
        hidden = F.gelu(linear(f"{prefix}.mlp.fc1", norm(f"{prefix}.norm2", x)))
        x = x + linear(f"{prefix}.mlp.fc2", hidden)
    return linear("head", norm("norm", x).mean(dim=1))


def test_model_computes_its_formula():
    config = ViTConfig(image_size=6, patch_size=2, channels=3, classes=5, width=8, depth=2, heads=2)
    model = build_model(config, seed=3).double()
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(model(images), by_hand(model, images))


@pytest.mark.parametrize("data", DATA_NAMES)
def test_presets_are_made_of_plain_linears_with_sizes_the_sparse_gemm_takes(data):
    model = VisionTransformer(preset(data).model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {type(module) for module in linears.values()} == {nn.Linear}
    blocks = {name: module for name, module in linears.items() if name.startswith("blocks.")}
    assert set(linears) - set(blocks) == {"patch_embed", "head"}
    assert {name.split(".", 2)[2] for name in blocks} == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    for module in blocks.values():
        assert module.in_features % 16 == 0 and module.out_features % 16 == 0


def test_weights_depend_on_the_seed_alone_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    first = build_model(MODEL, seed=5).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = build_model(MODEL, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], build_model(MODEL, seed=6).state_dict()["head.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 10**12},
        {"depth": 10**9},
        {"depth": 10**5000},
        {"heads": 2.0},
        {"image_size": "28"},
        {"mlp_ratio": [4]},
        {"channels": None},
        {"width": 1 << 24, "depth": 1 << 24},
        {"width": 0},
        {"depth": 1.5},
        {"heads": True},
        {"image_size": 9},
        {"width": 20, "heads": 3},
    ],
)
def test_impossible_sizes_are_refused_by_name(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        dataclasses.replace(MODEL, **changes)


@pytest.mark.parametrize(
    "config",
    [
        MODEL,
        preset("digits").model,
        preset("fashion-mnist").model,
        ViTConfig(image_size=6, patch_size=2, channels=3, classes=5, width=8, depth=3, heads=2, mlp_ratio=3),
    ],
)
def test_what_a_model_holds_is_known_without_building_it(config):
    state = VisionTransformer(config).state_dict()
    assert (config.parameters, config.tensors) == (sum(tensor.numel() for tensor in state.values()), len(state))


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 1, 8, 4), (2, 3, 8, 8)])
def test_another_image_shape_is_refused(shape):
    with pytest.raises(ShapeError, match=r"images has shape"):
        build_model(MODEL, seed=0)(torch.zeros(shape))
