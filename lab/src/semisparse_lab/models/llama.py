"""A decoder in the style of Llama, made of plain nn.Linear layers without biases."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse.errors import ConfigError, ShapeError
from semisparse_lab.checks import check_counts
from semisparse_lab.models.transformer import LARGEST_SIZE

_INIT_STD = 0.02
_EPSILON = 1e-5
_ROPE_BASE = 10000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """Sizes of a decoder. Immutable, checked when it is built.

    Args:
        vocabulary: Tokens that it knows.
        context: Tokens that it sees at most.
        width: Features per token.
        hidden: Features inside the MLP.
        depth: Blocks.
        heads: Attention heads; each has an even number of features.

    Raises:
        ConfigError: A size is not a positive whole number of at most LARGEST_SIZE or does not divide.
    """

    vocabulary: int = 8192
    context: int = 2048
    width: int = 4096
    hidden: int = 11008
    depth: int = 2
    heads: int = 32

    def __post_init__(self) -> None:
        check_counts(self, ("vocabulary", "context", "width", "hidden", "depth", "heads"), most=LARGEST_SIZE)
        if self.width % (2 * self.heads):
            raise ConfigError(f"width={self.width} must be a multiple of twice heads={self.heads}")

    def multiplications(self) -> dict[str, int]:
        """Multiplications per token in one forward pass of a full context: in block linears, head and attention.

        A causal token sees half of the context in the mean. Forward and backward take three times as many.
        """
        linears = self.depth * self.width * (4 * self.width + 3 * self.hidden)
        return {
            "block_linears": linears,
            "head": self.width * self.vocabulary,
            "attention": self.depth * self.context * self.width,
        }


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension; computes in fp32 and returns the dtype of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width); returns the same shape."""
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + _EPSILON).rsqrt() * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions. x: (B, T, width); returns the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Attention over the T tokens of each sequence; turns are those of `rotations`."""
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (project(x).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (each.transpose(1, 2) for each in (rotated(q, turns), rotated(k, turns), v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). x: (..., width); returns the same shape."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The three products."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm block: attention, then MLP, each added to its input."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(config.width), RMSNorm(config.width)
        self.attn = Attention(config.width, config.heads)
        self.mlp = MLP(config.width, config.hidden)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """x: (B, T, width); returns the same shape."""
        x = x + self.attn(self.norm1(x), turns)
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    """Decoder-only transformer: rotary positions, RMS norms, SwiGLU, a head of its own.

    Input: tokens, (B, T) of an integer dtype, T at most config.context. Output: the logits of each next token, (B, T,
    vocabulary). The linear layers are blocks.<i>.attn.q_proj, k_proj, v_proj, o_proj, blocks.<i>.mlp.gate_proj,
    up_proj, down_proj and head. Under autocast the residual stream has autocast's dtype.

    Args:
        config: Sizes of the model.

    Raises:
        ShapeError: In forward, if the input has another shape.
    """

    turns: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.register_buffer("turns", rotations(config.context, config.width // config.heads), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of a batch."""
        if inputs.dim() != 2 or inputs.shape[1] > self.config.context:
            raise ShapeError(
                f"inputs has shape {tuple(inputs.shape)}; this model takes (batch, at most {self.config.context})"
            )
        x, kind = self.token_embed(inputs), inputs.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        turns = self.turns[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x, turns)
        return self.head(self.norm(x))


def rotations(tokens: int, features: int) -> Tensor:
    """Cosines and sines of rotary positions (arXiv 2104.09864), (tokens, 2, features // 2) in fp32.

    Args:
        tokens: Positions.
        features: Of a head.
    """
    speeds = _ROPE_BASE ** (-torch.arange(0, features, 2, dtype=torch.float64) / features)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float64), speeds)
    return torch.stack((angles.cos(), angles.sin()), dim=1).float()


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """x (B, T, heads, features) with the halves of each head turned against each other by its position.

    Args:
        x: Any float dtype, which is returned.
        turns: Of `rotations`, for T tokens.
    """
    cosine, sine = turns[:, None].unbind(dim=2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


def build_llama(config: LlamaConfig, seed: int, device: torch.device | str = "cpu") -> Llama:
    """A new model on device; its weights depend on config, seed and the kind of device alone.

    They are drawn on the device, because a processor takes seconds for half a billion numbers.
    """
    with torch.device(device):
        model = Llama(config)
    numbers = torch.Generator(device).manual_seed(seed)
    into_residual = _INIT_STD / (2 * config.depth) ** 0.5  # what is added to the residual stream, 2 x depth times
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
            else:
                std = into_residual if name.endswith(("o_proj.weight", "down_proj.weight")) else _INIT_STD
                parameter.normal_(std=std, generator=numbers)
    return model
