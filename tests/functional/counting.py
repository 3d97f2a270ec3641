"""Counting which ops of semisparse run."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CountOps(TorchDispatchMode):
    """Inside the context, counts[name] says how often each semisparse op ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "semisparse":
            self.counts[func._schema.name.removeprefix("semisparse::")] += 1
        return func(*args, **(kwargs or {}))
