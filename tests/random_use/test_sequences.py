"""Random use: sequences of what users do to a model, each training step judged by an independent brute force.

The oracle keeps its own account of settings and phases, looks for the best of all 90 tiles itself, and computes the
step with plain PyTorch. 100 sequences per change, 2,000 with SEMISPARSE_EVERY_CASE=1.
"""

import copy
import io
import tempfile
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

import semisparse
from semisparse import Phase, SparseConfig, SparseSchedule, recipes, routes
from semisparse.exactness import ERROR_RATIO, largest, own_error
from semisparse.nn import SemiSparseLinear
from semisparse.reference.masks import from_codes
from tests.conftest import EVERY_CASE

K, WIDTH, N, LR = 16, 32, 16, 0.25
NAMES = ("0", "2")
TILES = torch.tensor(
    [
        tile
        for tile in product((0, 1), repeat=16)
        if all(sum(tile[4 * row : 4 * row + 4]) == 2 for row in range(4))
        and all(sum(tile[column::4]) == 2 for column in range(4))
    ],
    dtype=torch.float64,
)
"""All tiles with two entries per row and column, by enumeration."""

CONFIGS = {
    "2:4": SparseConfig(),
    "row": SparseConfig(weight="row"),
    "repack": SparseConfig(repack=True),
    "mvue": SparseConfig(grad_output="mvue"),
}
DECAY = 0.0625
HELD = 2  # applied steps for which fst holds its masks
FOREVER = 10**9
RECIPES = {
    "safest": (recipes.safest(sparse_fraction=0.5), 4, 2),
    "sr_ste": (recipes.sr_ste(decay=DECAY), 4, FOREVER),
    "fst": (recipes.fst(decay=DECAY, refresh_every=HELD, sparse_fraction=0.75, grad_output=None), 8, 6),
}
"""With the steps of the run and how many of them are sparse."""
DECAYED = ("sr_ste", "fst")


def tiled(matrix: Tensor) -> Tensor:
    """N x K as tiles of 16 entries."""
    n, k = matrix.shape
    return matrix.reshape(n // 4, 4, k // 4, 4).transpose(1, 2).reshape(-1, 16)


def assert_best(mask: Tensor, weight: Tensor, name: str) -> None:
    """mask keeps as much of weight as any that is allowed, by search through all of them."""
    size = weight.detach().double().abs()
    if name == "row":
        kept = (size * mask).reshape(-1, 4).sum(1)
        assert torch.equal(mask.reshape(-1, 4).sum(1), torch.full_like(kept, 2, dtype=torch.int64))
        best = size.reshape(-1, 4).topk(2).values.sum(1)
    else:
        assert all(bool((tile == TILES).all(1).any()) for tile in tiled(mask.double()))
        kept, best = (tiled(size) * tiled(mask.double())).sum(1), (tiled(size) @ TILES.T).max(1).values
    torch.testing.assert_close(kept, best, rtol=2.0**-20, atol=0.0)


def step_of(model: nn.Module, x: Tensor, dy: Tensor, masks: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """y, the gradients of x, and of weights and biases: the model with masked weights, in dtype, by plain PyTorch."""
    first, last = (model.get_submodule(name) for name in NAMES)
    leaves = [x, first.weight, first.bias, last.weight, last.bias]
    x, *held = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
    masked = [weight + (weight * masks[name] - weight).detach() if name in masks else weight
              for name, weight in zip(NAMES, held[::2], strict=True)]  # fmt: skip
    hidden = nn.functional.silu(nn.functional.linear(x, masked[0], held[1]))
    y = nn.functional.linear(hidden, masked[1], held[3])
    gradients = torch.autograd.grad(y, (x, *held), dy.to(dtype))
    return [y, *gradients]


class Use(RuleBasedStateMachine):
    """What a user may do, in any order."""

    @initialize(
        seed=st.integers(0, 2**16),
        packed=st.booleans(),
        compiled=st.sampled_from([False] * 3 + [True]),
        key=st.sampled_from([*sorted(CONFIGS), ""]),
    )
    def build(self, seed: int, packed: bool, compiled: bool, key: str) -> None:
        self.patch = pytest.MonkeyPatch()
        if packed:  # the packed route has a CPU implementation; only the choice of route is forced
            self.patch.setattr(routes, "packs", lambda weight, dtype, backend: dtype in (torch.bfloat16, torch.float16))
        self.random = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(K, WIDTH), nn.SiLU(), nn.Linear(WIDTH, N))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=self.random))
        self.compiled, self.autocast = compiled, False
        self.expected: dict[str, str] = {}  # layer name -> key of CONFIGS, of layers that are swapped
        self.schedule: SparseSchedule | None = None
        self.recipe = ""
        self.sparse_steps = 0  # applied steps until the schedule's dense phase; negative without a schedule
        self.off: set[str] = set()  # layers that a schedule left in its dense phase
        self.held: dict[str, Tensor] = {}  # masks that fst holds
        self.age = 0  # applied steps since they were chosen
        if compiled:
            event("compiled")
        self.rebuilt()
        if key:
            self.sparsify(key, NAMES)

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self._drop_schedule()
            self.patch.undo()
            torch._dynamo.reset()

    @property
    def sparse(self) -> bool:
        return bool(self.expected)

    @precondition(lambda self: self.schedule is None and len(self.expected) < len(NAMES))
    @rule(key=st.sampled_from(sorted(CONFIGS)), names=st.sampled_from([NAMES, NAMES[:1], NAMES[1:]]))
    def sparsify(self, key: str, names: tuple[str, ...]) -> None:
        free = [name for name in names if name not in self.expected]
        if not free:
            return
        report = semisparse.sparsify(self.model, dict.fromkeys(free, CONFIGS[key]))
        assert set(report.swapped) == set(free)
        self.expected |= dict.fromkeys(free, key)

    @precondition(lambda self: self.sparse)
    @rule(weights=st.sampled_from(["dense", "masked"]))
    def densify(self, weights: str) -> None:
        masks = self.masks(everywhere=True)
        before = {name: self.layer(name).weight.detach().clone() for name in masks}
        semisparse.densify(self.model, weights)  # before a recipe takes its masks along
        self._drop_schedule()
        for name, weight in before.items():
            wanted = weight * masks[name] if weights == "masked" else weight
            assert torch.equal(self.layer(name).weight, wanted)
            assert type(self.layer(name)) is nn.Linear
        self.expected, self.off = {}, set()

    @precondition(lambda self: self.sparse and self.schedule is None)
    @rule(steps=st.integers(1, 3), pack=st.sampled_from(["each_forward", "per_step"]))
    def follow_a_schedule(self, steps: int, pack: Any) -> None:
        event(f"packed {pack}")
        self.schedule = SparseSchedule(self.model, [Phase("sparse", steps), Phase("dense", 2)], pack=pack)
        self.sparse_steps, self.off = steps, set()

    @precondition(lambda self: self.schedule is None)
    @rule(name=st.sampled_from(sorted(RECIPES)))
    def follow_a_recipe(self, name: str) -> None:
        if self.sparse:
            self.densify("dense")
        event(f"recipe {name}")
        recipe, total_steps, self.sparse_steps = RECIPES[name]
        semisparse.sparsify(self.model, recipe.config)
        self.expected = dict.fromkeys(NAMES, "2:4")
        self.schedule = recipes.RecipeSchedule(recipe, self.model, self.optimizer, total_steps)
        self.recipe, self.off, self.held, self.age = name, set(), {}, 0

    @rule()
    def copy(self) -> None:
        self._drop_schedule()
        self.model = copy.deepcopy(self.model)
        self.rebuilt()

    @rule()
    def save_and_load(self) -> None:
        there = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in there.parameters():
                parameter.zero_()
        there.load_state_dict(load(save(dict(self.model.state_dict()))))
        assert all(
            torch.equal(one, other) for one, other in zip(there.parameters(), self.model.parameters(), strict=True)
        )
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        self.model.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))

    @precondition(lambda self: self.sparse and self.schedule is None)
    @rule(how=st.sampled_from(["file", "fx", "torch.export"]))
    def export(self, how: str) -> None:
        """What is exported computes what the model does."""
        if how == "torch.export" and not EVERY_CASE:  # takes as long as twenty sequences
            how = "fx"
        event(f"exported: {how}")
        masks = self.masks(everywhere=True)
        if how == "file":
            self._export_to_a_file(masks)
            return
        x = torch.ones(8, K, dtype=self.layer("0").weight.dtype)
        program = torch.fx.symbolic_trace(self.model) if how == "fx" else torch.export.export(self.model, (x,)).module()
        assert torch.equal(program(x), self.model(x))

    def _export_to_a_file(self, masks: dict[str, Tensor]) -> None:
        """The masked weights of a copy, which another program finds to be 2:4."""
        there = copy.deepcopy(self.model)
        semisparse.densify(there, "masked")
        with tempfile.TemporaryDirectory() as folder:
            save_file(there.state_dict(), f"{folder}/model.safetensors")
            found = {weight.name: weight for weight in semisparse.check_checkpoint(f"{folder}/model.safetensors")}
            read = load_file(f"{folder}/model.safetensors")
        for name, mask in masks.items():
            assert torch.equal(read[f"{name}.weight"], self.layer(name).weight * mask)
            assert found[f"{name}.weight"].columns == 1.0
            assert found[f"{name}.weight"].rows == 1.0 or self.expected[name] == "row"

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def cast(self, dtype: torch.dtype) -> None:
        if self.schedule is None:
            self.model.to(dtype)
            self.rebuilt()

    @rule(autocast=st.booleans())
    def enter_or_leave_autocast(self, autocast: bool) -> None:
        self.autocast = autocast

    @rule(frozen=st.booleans(), name=st.sampled_from(NAMES))
    def freeze(self, frozen: bool, name: str) -> None:
        if self.schedule is None:
            self.layer(name).weight.requires_grad_(not frozen)

    @invariant()
    def train(self) -> None:
        """A training step after whatever was done, judged."""
        if not hasattr(self, "model"):
            return
        rows = (1, 3, 8, 40)[int(torch.randint(4, (), generator=self.random))]
        stored = self.layer("0").weight.dtype
        dtype = torch.bfloat16 if self.autocast else stored
        x, dy = (torch.randn(rows, size, generator=self.random).to(stored) for size in (K, N))
        masks, layers = self.masks(), [self.layer(name) for name in NAMES]
        exact = step_of(self.model, x, dy, masks, torch.float64)
        plain = step_of(self.model, x, dy, masks, dtype)
        x.requires_grad_()
        self.optimizer.zero_grad()
        compiles = self.compiled and bool(
            torch.rand((), generator=self.random) < 0.4
        )  # each takes as long as ten steps
        forward = torch.compile(self.model, backend="eager") if compiles else self.model
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            y = forward(x)
        y.backward(dy.to(y.dtype))
        found = [y, x.grad, *(tensor.grad for layer in layers for tensor in (layer.weight, layer.bias))]
        sampled = {2 + 2 * place for place, name in enumerate(NAMES) if self.expected.get(name) == "mvue"} - {
            2 + 2 * place for place, name in enumerate(NAMES) if name not in masks
        }
        for place, (ours, theirs, wanted) in enumerate(zip(found, plain, exact, strict=True)):
            if ours is None:
                assert place > 1 and not layers[(place - 2) // 2].weight.requires_grad
            elif place in sampled:
                assert ours.isfinite().all()
            else:
                assert largest(ours.detach().double() - wanted) <= ERROR_RATIO * own_error(theirs, wanted), place
        self.apply(masks)

    def apply(self, masks: dict[str, Tensor]) -> None:
        """The optimizer step and the schedule's, and what they leave."""
        before = {name: self.layer(name).weight.detach().clone() for name in NAMES}
        gradients = {name: self.layer(name).weight.grad for name in NAMES}
        raw = {name: None if one is None else one.clone() for name, one in gradients.items()}
        self.optimizer.step()
        for name in NAMES:
            if raw[name] is not None:
                slope = raw[name]
                if self.recipe in DECAYED and name in masks:
                    slope = slope + DECAY * (before[name] * ~masks[name])
                assert torch.equal(self.layer(name).weight, before[name] - LR * slope) or self.recipe in DECAYED
                torch.testing.assert_close(self.layer(name).weight, before[name] - LR * slope)
        if self.schedule is not None:
            self.schedule.step()
            self.sparse_steps -= 1
            self.off = set(self.expected) if self.sparse_steps <= 0 else set()
            self.age = self.age if self.off else (self.age + 1) % HELD

    def masks(self, everywhere: bool = False) -> dict[str, Tensor]:
        """By layer name, each proved to be the best, of layers that are sparse now; or of all that are swapped."""
        found = {}
        for name, key in self.expected.items():
            layer = self.layer(name)
            assert isinstance(layer, SemiSparseLinear)
            assert layer.sparse_enabled == (name not in self.off)
            if everywhere or name not in self.off:
                held = layer.held_codes
                found[name] = layer.chosen_mask() if held is None else from_codes(held)
                if self.recipe != "fst" or name not in self.held or (self.age == 0 and not self.off):
                    assert_best(found[name], layer.weight, key)
                    self.held[name] = found[name]
                assert torch.equal(found[name], self.held[name])
        return found

    def layer(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def rebuilt(self) -> None:
        """The optimizer of the model as it is now."""
        self.optimizer = torch.optim.SGD(self.model.parameters(), LR)

    def _drop_schedule(self) -> None:
        if isinstance(self.schedule, recipes.RecipeSchedule):
            self.schedule.finish()
        self.schedule, self.recipe = None, ""


TestUse = Use.TestCase
TestUse.settings = settings(
    max_examples=2000 if EVERY_CASE else 100,
    stateful_step_count=10,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestUse.pytestmark = [  # type: ignore[attr-defined]
    pytest.mark.filterwarnings("ignore::UserWarning")
]
