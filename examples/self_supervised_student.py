"""Self-distillation as in DINO: a student learns from a teacher that is the moving average of its own weights.

    python examples/self_supervised_student.py              # generated images, a few seconds on a CPU
    python examples/self_supervised_student.py --width 512 --steps 2000

The student's MLPs are 2:4 sparse for 70 % of the steps. The teacher is a copy that was made after the swap, so its MLPs
are sparse layers too, and schedule.follow() switches them together with the student's. Without it they would stay
sparse. A copy that is made before the swap stays dense throughout, which is how DINOv2 was trained. The lines
that differ from dense training are marked with [sparse].
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse import SparseSchedule, densify, sparsify  # [sparse]

SIDE, CLASSES, PROTOTYPES, MOMENTUM = 16, 10, 256, 0.95


class Network(nn.Module):
    """Images (batch, SIDE, SIDE) to scores of PROTOTYPES; features() is what is learned."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE**2, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, PROTOTYPES)

    def features(self, images: Tensor) -> Tensor:
        """(batch, width), normalised."""
        x = self.embed(images.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, PROTOTYPES)."""
        return self.head(self.features(images))


def views(images: Tensor, clutter: Tensor) -> Tensor:
    """The images before a random mixture of clutter (patterns, SIDE, SIDE), which the network has to look through."""
    weights = torch.randn(len(images), len(clutter), device=images.device)
    return images + torch.einsum("nk,kij->nij", weights, clutter)


def nearest_neighbour_accuracy(network: Network, images: Tensor, labels: Tensor) -> float:
    """Share of the second half of images whose nearest neighbour in the first half, by cosine, has their label."""
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
        features = F.normalize(network.features(images).float(), dim=1)
    half = len(images) // 2
    nearest = (features[half:] @ features[:half].T).argmax(dim=1)
    return (labels[:half][nearest] == labels[half:]).float().mean().item()


def main() -> None:
    """Train without labels, and print how well the labels of nearest neighbours agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    labels = (torch.arange(2000) % CLASSES).to(options.device)
    shapes = torch.randn(CLASSES, SIDE, SIDE, device=options.device)
    images, clutter = shapes[labels], 2 * torch.randn(8, SIDE, SIDE, device=options.device)
    seen = views(images, clutter)

    student = Network(options.width).to(options.device)
    print(f"untrained: nearest-neighbour accuracy {nearest_neighbour_accuracy(student, seen, labels):.1%}")
    print(sparsify(student, select="blocks"))  # [sparse]
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    schedule = SparseSchedule.sparse_then_dense(student, options.steps, sparse_fraction=0.7)  # [sparse]
    schedule.follow(teacher)  # [sparse] its layers are sparse and dense when the student's are
    center = torch.zeros(PROTOTYPES, device=options.device)

    for step in range(options.steps):
        batch = images[torch.randint(len(images), (64,), device=options.device)]
        with torch.autocast(options.device.split(":")[0], torch.bfloat16):
            with torch.no_grad():
                given = teacher(views(batch, clutter)).float()
            named = student(views(batch, clutter)).float()
        # The sharp, centred target keeps both from naming one prototype, or all alike, for every image.
        target = ((given - center) / 0.1).softmax(dim=1)
        loss = -(target * (named / 0.2).log_softmax(dim=1)).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()  # [sparse] after the optimizer: switches student and teacher
        with torch.no_grad():
            center.lerp_(given.mean(dim=0), 0.1)
            for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.lerp_(theirs, 1 - MOMENTUM)  # the master weights: the teacher chooses its own masks
        if step % 20 == 19:
            print(f"step {step + 1}: {schedule.phase} next, loss {loss.item():.3f}")

    for network in (student, teacher):
        densify(network)  # [sparse] plain nn.Linear again
    for name, network in (("student", student), ("teacher", teacher)):
        print(f"{name}: nearest-neighbour accuracy {nearest_neighbour_accuracy(network, seen, labels):.1%}")


if __name__ == "__main__":
    main()
