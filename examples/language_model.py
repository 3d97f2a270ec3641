"""A small GPT over bytes, trained with a recipe of the literature for 2:4 sparse training.

    python examples/language_model.py                          # the source of Python's own standard library
    python examples/language_model.py --text book.txt --recipe fst --width 384 --depth 6 --steps 5000

A recipe says which steps are sparse, how masks are chosen and held, and what happens to pruned weights. It needs the
optimizer, because some recipes add a decay to its gradients. The lines that differ from dense training are marked with
[sparse].
"""

import argparse
import sysconfig
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse import densify, recipes, sparsify  # [sparse]

RECIPES = ("dinov2", "sr_ste", "fst", "s_ste")


class Block(nn.Module):
    """Causal attention, then an MLP, each added to its input."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, width); returns the same shape."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes (batch, tokens) to the logits of each next byte (batch, tokens, 256)."""

    def __init__(self, context: int, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        """text: int64."""
        return self.head(self.norm(self.blocks(self.embed(text) + self.positions)))


def read(path: Path | None) -> Tensor:
    """The bytes of a file, or of the modules of the standard library, as uint8."""
    files = [path] if path is not None else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.from_numpy(np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8).copy())


def windows(text: Tensor, count: int, context: int) -> tuple[Tensor, Tensor]:
    """count random windows of text, and the bytes that follow theirs."""
    starts = torch.randint(len(text) - context, (count, 1), device=text.device)
    chosen = text[starts + torch.arange(context + 1, device=text.device)].long()
    return chosen[:, :-1], chosen[:, 1:]


def main() -> None:
    """Train, and print the bits per byte of text that the model has not seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="file to learn (default: Python's standard library)")
    parser.add_argument("--recipe", choices=RECIPES, default="dinov2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    text = read(options.text).to(options.device)
    train, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
    model = GPT(options.context, options.width, options.depth).to(options.device)
    autocast = torch.autocast(options.device.split(":")[0], torch.bfloat16)

    recipe = getattr(recipes, options.recipe)()  # [sparse] with its paper's settings; each is an argument
    print(sparsify(model, recipe.config, select="mlp"))  # [sparse]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = recipes.RecipeSchedule(recipe, model, optimizer, options.steps)  # [sparse]

    for step in range(options.steps):
        inputs, targets = windows(train, 32, options.context)
        with autocast:
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()  # [sparse] after the optimizer
        if step % 20 == 19:
            print(f"step {step + 1}: {schedule.phase} next, {loss.item() / np.log(2):.3f} bits per byte")

    # A run that ends sparse keeps the pruned weights, so that the plain model computes what was trained.
    densify(model, weights="masked" if schedule.phase == "sparse" else "dense")  # [sparse]
    schedule.finish()  # [sparse] the optimizer is a plain one again
    with torch.no_grad(), autocast:
        inputs, targets = windows(held_out, 256, options.context)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    print(f"held-out text: {loss.item() / np.log(2):.3f} bits per byte")


if __name__ == "__main__":
    main()
