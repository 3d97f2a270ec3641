"""What features are worth, without training the network that made them: nearest neighbours and a linear probe."""

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 20
_VOTE_TEMPERATURE = 0.07
_CHUNK = 1000


def knn_votes(memory: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int = NEIGHBOURS) -> Tensor:
    """Shares of the votes (n, classes) of the k nearest of memory (m, d) for queries (n, d), by cosine, in fp32.

    As in DINO a neighbour of cosine s weighs exp(s / 0.07).

    Args:
        memory: Features (m, d) of known class.
        labels: Their classes, (m,) int64.
        queries: Features (n, d).
        classes: Number of classes.
        k: Neighbours that vote; with fewer in memory, all of them do.
    """
    with torch.autocast(memory.device.type, enabled=False):
        memory, parts = F.normalize(memory.float(), dim=1), []
        for part in F.normalize(queries.float(), dim=1).split(_CHUNK):
            cosine, nearest = (part @ memory.T).topk(min(k, len(memory)), dim=1)
            weight = (cosine / _VOTE_TEMPERATURE).softmax(dim=1)
            parts.append(weight.new_zeros(len(part), classes).scatter_add_(1, labels[nearest], weight))
        return torch.cat(parts)


def linear_probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, steps: int = 100) -> float:
    """Accuracy (0 to 1) on test of a logistic regression on train.

    Features are standardised by train. L-BFGS starts from zero, sees all of train, and has a little weight decay.

    Args:
        train: Features (n, d) and labels (n,) int64.
        test: The same.
        classes: Number of classes.
        steps: Of L-BFGS, at most.
    """
    std, mean = torch.std_mean(train[0], dim=0)
    x, queries = ((part - mean) / (std + 1e-6) for part in (train[0], test[0]))
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), train[1]) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (F.linear(queries, weight, bias).argmax(dim=1) == test[1]).float().mean().item()
