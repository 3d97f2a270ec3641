"""2:4 training in torchtitan 0.3: what a function of its config registry looks like.

    pip install torchtitan==0.3.0
    python examples/trainers/torchtitan_config.py     # builds the debug model; trains one block of it, also on a CPU

Copy llama3_2to4 into a config registry of yours and start torchtitan's own training with it. The lines that make the
training sparse are marked with [sparse].
"""

import argparse
from typing import Any

import torch
from torchtitan.components.optimizer.optimizer import default_adamw
from torchtitan.models.llama3 import model_registry

from semisparse import densify, recipes, semi_sparse_layers  # [sparse]
from semisparse.integrations.torchtitan import ScheduleHook, SemiSparseConverter  # [sparse]

RECIPE = recipes.safest()  # [sparse]


def sparse_spec(flavor: str, hook: ScheduleHook) -> Any:
    """The specification of a model with 2:4 feed-forward layers."""
    converter = SemiSparseConverter.Config(sparse=RECIPE.config, select=["feed_forward"])  # [sparse]
    return hook.attach(model_registry(flavor, converters=[converter]))  # [sparse]


def llama3_2to4() -> Any:
    """For a config registry: --training.steps may say how many steps, and a run goes on from its checkpoints."""
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    config = llama3_debugmodel()
    config.model_spec = sparse_spec("debugmodel", ScheduleHook(recipe=RECIPE))  # [sparse]
    config.training.disable_cuda_graphs = True  # [sparse] a recorded graph would not see that a phase ends
    return config


def main() -> None:
    """Do with one feed-forward block what torchtitan's Trainer does with the model on GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    spec = sparse_spec("debugmodel", ScheduleHook(recipe=RECIPE))
    with torch.device("meta"):
        model = spec.model.build()
    model.verify_module_protocol()
    print(f"{len(semi_sparse_layers(model))} layers of the debug model are 2:4 sparse")

    torch.manual_seed(0)
    block = spec.model.layers[0].feed_forward.build().to(options.device)
    block.init_states()
    hook = ScheduleHook(options.steps, RECIPE)
    optimizers = default_adamw(lr=1e-3).build(model_parts=[block])
    hook(optimizers, [block], None)
    for _ in range(options.steps):
        x = torch.randn(64, 256, device=options.device)
        loss = (block(x) - x).square().mean()
        loss.backward()
        optimizers.step()  # the hook counts it
        optimizers.zero_grad()
    densify(block)  # torchtitan's own Linear again
    print(f"{hook.schedule}, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
