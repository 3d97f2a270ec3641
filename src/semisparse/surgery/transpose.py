"""Transposing weights in place: the Parameter objects stay, and all weights are transposed or none."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from semisparse.errors import LayerRefusedError
from semisparse.surgery.sharing import holders

_ALIVE = "semisparse.alive"  # key in the metadata of a node of the graph


def transpose_refusal(layer: nn.Module, parent: nn.Module | None) -> str | None:
    """Why the weight of a layer below parent cannot be transposed in place, in either direction, or None."""
    if parametrize.is_parametrized(layer):
        return "it is parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"
    weight = layer._parameters.get("weight")
    if weight is None:
        return (
            "its weight is not a Parameter, but computed by a hook (weight_norm, pruning) or flattened: undo that first"
        )
    if hasattr(weight, "full_tensor"):
        return "its weight is a sharded DTensor: convert before sharding"
    if type(weight) is not nn.Parameter or weight.is_inference():
        kind = "an inference tensor" if weight.is_inference() else f"a {type(weight).__name__}"
        return f"its weight is {kind}: convert while it is a plain nn.Parameter"
    n = weight.shape[0 if isinstance(layer, nn.Linear) else -1] if weight.dim() == 2 else None
    bias = layer._parameters.get("bias")
    if n is None or "bias" not in layer._parameters or (bias is not None and bias.shape != (n,)):
        return "it needs a 2-D weight and the bias that fits it, or register_parameter('bias', None)"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance (accelerate does that): remove that first"
    if hasattr(parent, "fan_in_fan_out"):  # peft's name for a weight of K x N
        return f"the adapter {type(parent).__name__} around it relies on the shape of its weight: convert without it"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "its weight has gradient hooks, whose gradients would change shape: register them after converting"
    if _in_a_graph(weight):
        return (
            "a graph still holds its weight in the old shape: delete the outputs and losses of earlier forwards (del "
            "loss), and convert before wrapping with DistributedDataParallel"
        )
    return None


def transpose_weights(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Transpose the weights of layers of model, each once; on an error none of them.

    Raises:
        LayerRefusedError: A weight shares memory with something else in model that must keep its shape.
    """
    weights = {id(weight): weight for layer in layers.values() if (weight := layer._parameters["weight"]) is not None}
    _check_ties(model, layers)
    done = []
    try:
        for weight in weights.values():
            _transpose(weight)
            done.append(weight)
    except BaseException:  # no memory for another transpose, say, or Ctrl-C
        for weight in done:
            _transpose(weight)
        raise


def _check_ties(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    to_transpose = {id(layer) for layer in layers.values()}
    homes: dict[int, list[tuple[str, int, bool]]] = {}  # memory -> the tensors there: name, identity, to be transposed
    for name, module, tensor in holders(model):
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:
            memory = tensor.untyped_storage().data_ptr() or id(tensor)  # 0: on meta, or empty
            known = name.rpartition(".")[2] == "weight" and id(module) in to_transpose
            homes.setdefault(memory, []).append((name, id(tensor), known))
    for tensors in homes.values():
        weight, identity, _ = next((home for home in tensors if home[2]), ("", 0, False))
        other = next((name for name, tensor, known in tensors if not known or tensor != identity), None)
        if weight and other:
            raise LayerRefusedError(
                f"{weight} and {other} share their values, and {other} must keep its shape: untie them first (give one "
                "a clone)"
            )


@torch.no_grad()
def _transpose(weight: Tensor) -> None:
    """Transpose weight and its gradient, both contiguous afterwards; the Parameter object stays."""
    with torch.inference_mode(False):
        values, grad = weight.t().contiguous(), None if weight.grad is None else weight.grad.t().contiguous()
        weight.grad = None
        weight.data = values
        weight.grad = grad
        torch.autograd.graph.increment_version(weight)  # so that a backward that had saved the old values raises


def _in_a_graph(weight: Tensor) -> bool:
    """Whether weight's AccumulateGrad node is alive; it keeps the shape, and DDP has its hooks there.

    A node that exists only because this function asks for it dies at once, together with the entry in its metadata.
    """
    if not weight.requires_grad:
        return False
    with torch.inference_mode(False):
        metadata: Any = torch.autograd.graph.get_gradient_edge(weight).node.metadata
        metadata[_ALIVE] = True
        node = torch.autograd.graph.get_gradient_edge(weight).node
    metadata = node.metadata
    return metadata.pop(_ALIVE, False)
