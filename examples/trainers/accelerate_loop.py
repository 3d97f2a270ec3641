"""A loop with Hugging Face accelerate: 2:4 sparse for 70 % of the steps, then dense, with a checkpoint on the way.

    pip install accelerate
    python examples/trainers/accelerate_loop.py --out run             # or: accelerate launch examples/...
    python examples/trainers/accelerate_loop.py --out run --resume

No callback is needed: accelerate saves the schedule, and says which steps it skipped. The lines that make the training
sparse are marked with [sparse].
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn

import semisparse  # [sparse]


def main() -> None:
    """Train a small network to reproduce its input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the checkpoint, which is saved after half of the steps")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    cpu = options.device == "cpu"
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=2, mixed_precision="no" if cpu else "bf16")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(options.width, 4 * options.width), nn.GELU(), nn.Linear(4 * options.width, options.width)
    )
    semisparse.sparsify(model)  # [sparse] before prepare
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = semisparse.SparseSchedule.sparse_then_dense(model, options.steps, sparse_fraction=0.7)  # [sparse]
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)  # [sparse] saved and loaded with the rest
    if options.resume:
        accelerator.load_state(options.out)
        print(f"goes on after step {schedule.applied_steps}")

    for batch in range(2 * schedule.applied_steps, 2 * options.steps):
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(32, options.width, generator=generator).to(accelerator.device)
        with accelerator.accumulate(model):
            loss = (model(x) - x).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step(skipped=optimizer.step_was_skipped)  # [sparse] counts steps, not batches
        if batch + 1 == options.steps:
            accelerator.save_state(options.out)

    model = accelerator.unwrap_model(model)
    semisparse.densify(model)  # [sparse]
    print(
        f"{schedule}, loss {loss.item():.4f}, sum of the weights {sum(p.sum() for p in model.parameters()).item():.6f}"
    )


if __name__ == "__main__":
    main()
