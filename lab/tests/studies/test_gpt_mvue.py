"""The rows are compared on text that is seen once, and differ in what is compared alone."""

import statistics
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from semisparse_lab.data.text import Corpus
from semisparse_lab.experiment import Experiment
from semisparse_lab.studies import gpt_mvue, text_once
from semisparse_lab.tasks.next_byte import NextByteOnce, bits_per_byte
from semisparse_lab.tasks.task import Batch, Forward

STEPS_PER_PART = 2
BATCH = text_once.settings("cpu", True)[1].batch_size
WINDOW = text_once.settings("cpu", True)[0].context + 1


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """The small experiment on a corpus whose training set holds the place of each byte."""
    held_out = torch.arange(300).remainder(97).to(torch.uint8)
    places = torch.arange(WINDOW * BATCH * text_once.SMALL_PARTS * STEPS_PER_PART + 50)
    monkeypatch.setattr(text_once, "packages", lambda *args, most: Corpus(places, held_out, held_out, 1, ""))
    monkeypatch.setattr(Corpus, "shortened", lambda corpus, length: corpus)
    return gpt_mvue.experiment(device="cpu", small=True)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that runs train on, as places."""
    drawn, batches = [], NextByteOnce.batches

    def spied(task: NextByteOnce, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        for x, y in batches(task, batch_size, generator):
            drawn.append((x, y))
            yield x % 97, y % 97

    monkeypatch.setattr(NextByteOnce, "batches", spied)
    return drawn


def test_the_pair_differs_in_nothing_but_the_weight_gradient() -> None:
    pair, sampled = (row.recipe for row in gpt_mvue.rows("auto")[:2])
    assert (pair.config.grad_output, sampled.config.grad_output) == (None, "mvue")
    assert pair == replace(sampled, config=replace(sampled.config, grad_output=None))


def test_rows_see_the_same_batches_and_no_byte_twice(experiment: Experiment, seen: list[Batch]) -> None:
    steps, runs = text_once.SMALL_PARTS * STEPS_PER_PART, {}
    for row in experiment.rows:
        outcome = experiment.train(row, 3, lambda progress: None)
        assert outcome.result.steps == len(seen) == steps
        runs[row.slug], seen[:] = list(seen), []
    for x, y in runs["fst"]:
        assert torch.equal(x + 1, y)  # what follows each byte
    windows = torch.cat([torch.cat([x[:, :1], y], dim=1) for x, y in runs["fst"]])
    assert len(windows.unique()) == steps * BATCH * WINDOW
    assert not torch.equal(windows, windows.sort(dim=0).values)
    for other in ("fst-mvue", "dense"):
        for ours, theirs in zip(runs["fst"], runs[other], strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    experiment.train(experiment.rows[0], 4, lambda progress: None)
    assert not torch.equal(seen[0][0], runs["fst"][0][0])


def test_the_figures_are_means_of_the_training_losses_in_bits(
    experiment: Experiment, seen: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, batch_loss = [], NextByteOnce.loss

    def spied(task: NextByteOnce, forward: Forward, batch: Batch) -> torch.Tensor:
        loss = batch_loss(task, forward, batch)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(NextByteOnce, "loss", spied)
    outcome = experiment.train(experiment.rows[1], 0, lambda progress: None)
    parts = [bits_per_byte(statistics.fmean(part)) for part in zip(losses[::2], losses[1::2], strict=True)]
    assert outcome.value == pytest.approx(statistics.fmean(parts))
    assert outcome.more["training_bits_in_the_sparse_phase"] == pytest.approx(statistics.fmean(parts[:-1]))
    assert outcome.more["training_bits_in_the_last_quarter"] == pytest.approx(parts[-1])  # of six
    assert outcome.more["held_out_bits"] == bits_per_byte(outcome.result.test.loss)
    spans = [(phase.kind, phase.start, phase.end) for phase in outcome.result.phases]
    assert spans == [("sparse", 0, 10), ("dense", 10, 12)]  # the sparse phase ends with a part


def test_the_usual_text_fills_24_parts_of_76_steps() -> None:
    model, train = text_once.settings("cpu", False)
    text = torch.zeros(text_once.TRAINING_BYTES, dtype=torch.uint8)
    task = NextByteOnce(Corpus(text, text, text, 1, ""), model.context, train.epochs)
    assert (train.epochs, task.steps_per_epoch(train.batch_size)) == (24, 76)
