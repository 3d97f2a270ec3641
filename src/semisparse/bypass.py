"""Containers that read a child's weight directly, so that swapping the child would silently do nothing.

Checked by name for packages that need not be installed. Sources: torch.nn.TransformerEncoderLayer's fast path,
torch.nn.MultiheadAttention, xFormers' SwiGLU, and timm's attention blocks that call F.linear on qkv.weight.
"""

from torch import nn


def bypass_reason(parent: nn.Module | None, child: str) -> str | None:
    """Why the layer held as parent.child would be bypassed, or None when it is called like any module."""
    if parent is None:
        return None
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads out_proj.weight and never calls the layer"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return (
            "nn.TransformerEncoderLayer's fast path in eval reads its weights and never calls the layer: use a block "
            "that calls its linears"
        )
    ancestry = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(parent).__mro__}
    if ("xformers", "SwiGLU") in ancestry:
        return "xFormers' SwiGLU reads its weights and never calls the layer: set XFORMERS_DISABLED=1"
    in_timm = any(package == "timm" for package, _ in ancestry)
    if in_timm and child == "qkv" and getattr(parent, "q_bias", None) is not None:
        return f"timm's {type(parent).__name__} with separate q and v biases reads qkv.weight and never calls the layer"
    return None
