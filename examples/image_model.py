"""A small vision transformer, trained with 2:4 sparse MLPs for 70 % of the steps and dense for the rest.

    python examples/image_model.py                                 # generated images, a few seconds on a CPU
    python examples/image_model.py --data images.npz --width 384   # your own: arrays "images" (n, side, side), "labels"

The four lines that make the training sparse are marked with [sparse].
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import semisparse  # [sparse]

PATCH, CLASSES = 4, 10


class Block(nn.Module):
    """Attention, then an MLP, each added to its input."""

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
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images (batch, side, side) to logits (batch, CLASSES)."""

    def __init__(self, side: int, width: int, depth: int) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(PATCH**2, width)
        self.positions = nn.Parameter(0.02 * torch.randn((side // PATCH) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Cuts images into patches, one token each; the class is read from their mean."""
        tokens = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        return self.head(self.norm(self.blocks(self.patch_embed(tokens) + self.positions)).mean(dim=1))


def load(path: str | None) -> tuple[Tensor, Tensor]:
    """Images (n, side, side) and labels (n,) from an npz file; for None generated ones, ten shapes under noise."""
    if path is not None:
        with np.load(path) as file:
            return torch.from_numpy(file["images"]).float(), torch.from_numpy(file["labels"]).long()
    shapes, labels = torch.randn(CLASSES, 16, 16), torch.arange(4000) % CLASSES
    return shapes[labels] + 2 * torch.randn(4000, 16, 16), labels


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that model names rightly."""
    model.eval()
    with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16):
        return (model(images).argmax(dim=1) == labels).float().mean().item()


def main() -> None:
    """Train, and print what was sparse and how well the dense model names images that it has not seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="npz file (default: generated images)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    images, labels = (part.to(options.device) for part in load(options.data))
    held_out = len(images) // 10
    model = ViT(images.shape[-1], options.width, options.depth).to(options.device)

    report = semisparse.sparsify(model, select="mlp")  # [sparse] in place; the other layers stay nn.Linear
    print(report)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = semisparse.SparseSchedule.sparse_then_dense(model, options.steps, sparse_fraction=0.7)  # [sparse]

    for step in range(options.steps):
        chosen = torch.randint(held_out, len(images), (64,), device=options.device)
        model.train()
        with torch.autocast(options.device.split(":")[0], torch.bfloat16):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()  # [sparse] after the optimizer: counts the step, and makes the layers dense after the last one
        if step % 20 == 19:
            print(f"step {step + 1}: {schedule.phase} next, loss {loss.item():.3f}")

    semisparse.densify(model)  # plain nn.Linear again, with the state_dict of a model that was never sparse
    print(f"accuracy on {held_out} held-out images: {accuracy(model, images[:held_out], labels[:held_out]):.1%}")


if __name__ == "__main__":
    main()
