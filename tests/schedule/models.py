"""A small model and its training, shared by the tests of schedules."""

import torch
from torch import nn

from semisparse import sparsify


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    sparsify(model)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, call=None) -> None:
    optimizer.zero_grad()
    (model if call is None else call)(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()
