"""Batches and scores of tokens."""

import math

import pytest
import torch
import torch.nn.functional as F

from lab.tests.toy_kernel import write_toy_tokens
from semisparse.errors import ConfigError
from semisparse_lab.data.tokens import TokenSets, load_tokens
from semisparse_lab.models.llama import LlamaConfig, build_llama
from semisparse_lab.tasks.next_token import NextToken, next_token_loss


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenSets:
    return load_tokens(write_toy_tokens(tmp_path_factory.mktemp("tokens") / "toy"))


def test_a_run_sees_no_window_twice_and_shorter_runs_see_the_same_first(tokens: TokenSets) -> None:
    numbered = TokenSets(torch.arange(600, dtype=torch.int16), *(tokens.test,) * 2, tokens.lengths, "")
    task = NextToken(numbered, 9, 4)
    whole = list(task.batches(task.most_steps, torch.Generator().manual_seed(3)))
    assert len(whole) == task.most_steps == 15
    seen = torch.cat([torch.cat((x, y[:, -1:]), dim=1) for x, y in whole])
    assert sorted(seen.flatten().tolist()) == list(range(600))
    assert all(torch.equal(x + 1, y) for x, y in whole)
    few = list(task.batches(2, torch.Generator().manual_seed(3)))
    assert all(torch.equal(one, two) for pair in zip(few, whole, strict=False) for one, two in zip(*pair, strict=True))
    with pytest.raises(ConfigError, match="steps=16 exceed the 15"):
        next(task.batches(16, torch.Generator()))


def test_scores_are_the_cross_entropy_over_tokens_and_over_bytes(tokens: TokenSets) -> None:
    model = build_llama(LlamaConfig(vocabulary=64, context=8, width=16, hidden=16, depth=1, heads=2), 0)
    with torch.no_grad():
        score = NextToken(tokens, 8, 3).score(model, "validation", windows=7)
        x, y = (tokens.validation[start : start + 48].long().view(6, 8) for start in (0, 1))
        nats = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    assert score.bytes == sum(1 + token % 5 for token in y.flatten().tolist())
    assert score.nats_per_token == pytest.approx(nats / 48)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / score.bytes)
    assert next_token_loss(model, x, y).item() == pytest.approx(nats / 48)


def test_a_text_that_is_too_short_is_refused(tokens: TokenSets) -> None:
    with pytest.raises(ConfigError, match="batch_size=100"):
        NextToken(tokens, 8, 100)
