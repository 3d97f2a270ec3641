"""llama-linux in small: its arms share one path, runs are kept, skipped and stopped."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from lab.tests.cli.shell import semisparse_lab
from lab.tests.toy_kernel import write_toy_tokens
from semisparse.errors import ConfigError
from semisparse_lab import strict_json
from semisparse_lab.data.tokens import TokenSets, load_tokens
from semisparse_lab.errors import OutputExistsError
from semisparse_lab.studies import llama_linux_runs
from semisparse_lab.studies.llama_linux import Arm, arms, chosen_arms, numbers, settings, train_arm
from semisparse_lab.studies.llama_linux_runs import jobs, listed, measure, run_jobs
from semisparse_lab.train import float8

SETTINGS = settings("cpu", small=True, steps=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_tokens(tmp_path_factory.mktemp("tokens") / "toy")


@pytest.fixture(scope="module")
def tokens(folder: Path) -> TokenSets:
    return load_tokens(folder)


def test_an_arm_that_is_never_sparse_is_the_dense_arm_bit_for_bit(tokens: TokenSets) -> None:
    dense = train_arm(arms()[0], 0, SETTINGS, tokens, 6)
    never = Arm("never", "never sparse", chosen_arms("bf16-24", 0.0)[0].recipe)
    same = train_arm(never, 0, SETTINGS, tokens, 6)
    other = train_arm(arms()[0], 1, SETTINGS, tokens, 6)
    assert [point.loss for point in same.run.curve] == [point.loss for point in dense.run.curve]
    assert same.test == dense.test and same.validation == dense.validation
    assert other.test != dense.test


def test_a_dense_start_moves_the_sparse_phase_and_a_held_mask_is_the_recipes(tokens: TokenSets) -> None:
    moved = replace(SETTINGS, dense_start=0.2, sparse_fraction=0.5)
    run = train_arm(chosen_arms("bf16-24", 0.5)[0], 0, moved, tokens, 10).run
    assert [(phase.kind, phase.end) for phase in run.phases] == [("dense", 2), ("sparse", 7), ("dense", 10)]
    assert all(arm.recipe.refresh_every == 40 for arm in arms(refresh_every=40) if arm.recipe is not None)
    with pytest.raises(ConfigError, match="choose one"):
        replace(moved, refresh_every=40)


def test_torchao_changes_the_process_and_no_other_arm_follows_it(
    tokens: TokenSets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, dense, float8 = list[str](), *arms()[:2]
    monkeypatch.setattr(llama_linux_runs, "_run", lambda job, *_: True)
    monkeypatch.setattr(llama_linux_runs, "float8_missing", str)
    compiled = replace(SETTINGS, compiled=True)
    todo = jobs([dense, float8], [0, 1], "tokens", compiled, tokens, tmp_path)
    assert run_jobs(todo, compiled, tokens, say=said.append) == [todo[0].path, todo[1].path, todo[3].path]
    assert len(said) == 1 and "call again" in said[0]


def test_without_torchao_its_arm_is_not_started_and_the_others_are(
    tokens: TokenSets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    todo = jobs(arms()[:3], [0], "tokens", SETTINGS, tokens, tmp_path)
    assert run_jobs(todo, SETTINGS, tokens, say=said.append) == [todo[0].path, todo[2].path]
    (line,) = [line for line in said if "not started" in line]
    assert line.startswith(todo[1].name) and line.endswith(f"torchao is not installed: {float8.INSTALL}")


def test_arms_differ_in_precision_and_sparse_products_alone() -> None:
    recipes = {arm.slug: arm.recipe for arm in arms(0.6) if arm.recipe is not None}
    assert all(recipe.sparse_fraction == 0.6 for recipe in recipes.values())
    assert recipes["fp8-24"].config == replace(recipes["bf16-24"].config, precision="fp8")
    assert recipes["fp8-24-mvue"].config == replace(recipes["fp8-24"].config, grad_output="mvue")
    assert [arm.slug for arm in arms() if arm.recipe is None] == ["bf16", "float8"]


def test_runs_are_kept_listed_and_skipped_and_settings_never_mix(tokens: TokenSets, tmp_path: Path) -> None:
    chosen, said = [arms()[0], arms()[3]], list[str]()
    todo = jobs(chosen, [0, 1], "tokens", SETTINGS, tokens, tmp_path)
    assert [(job.seed, job.arm.slug) for job in todo] == [(0, "bf16"), (0, "bf16-24"), (1, "bf16"), (1, "bf16-24")]
    there = run_jobs(todo[:2], SETTINGS, tokens, say=said.append)
    assert there == [job.path for job in todo[:2]] and not list(tmp_path.glob("*.partial"))
    document = json.loads(there[1].read_text())
    assert [phase["kind"] for phase in document["phases"]] == ["sparse", "dense"]
    assert document["curve"][-1][0] == document["scores"][-1][0] == document["steps"] == 10
    assert document["test"]["bits_per_byte"] > 0 and document["settings"]["text"] == tokens.sha256
    before = there[0].read_bytes()
    run_jobs(todo[:1], SETTINGS, tokens, say=said.append)
    assert said[-1].endswith("there already, skipped") and there[0].read_bytes() == before
    assert "| there |" in listed(todo, tokens, SETTINGS) and "no times yet" in listed(todo, tokens, SETTINGS)
    with pytest.raises(OutputExistsError, match="was made with settings"):
        jobs(chosen, [0], "tokens", settings("cpu", small=True, steps=10, lr=1e-3), tokens, tmp_path)


def test_a_run_that_meets_the_deadline_leaves_what_it_has(tokens: TokenSets, tmp_path: Path) -> None:
    (job,) = jobs(arms()[:1], [0], "tokens", SETTINGS, tokens, tmp_path)
    said: list[str] = []
    late = iter((0.001, -0.001))
    assert run_jobs([job], SETTINGS, tokens, lambda: next(late), said.append) == [] and not job.path.exists()
    partial = json.loads(job.path.with_suffix(".partial").read_text())
    assert not partial["finished"] and partial["test"] is None and partial["scores"]
    assert "time is up" in said[-1]
    assert run_jobs([replace(job, seconds=1e6)], SETTINGS, tokens, lambda: 1e3, said.append) == []
    assert "not started" in said[-1] and "1000000 s" in said[-1]


def test_runs_of_equal_seconds_have_the_steps_that_their_times_allow(tokens: TokenSets, tmp_path: Path) -> None:
    chosen = [arms()[0], arms()[3]]
    with pytest.raises(ConfigError, match="--time-only"):
        jobs(chosen, [0], "seconds", SETTINGS, tokens, tmp_path)
    for arm in chosen:
        path = measure(arm, 5, SETTINGS, tokens, tmp_path, 4.0, lambda line: None)
        times = strict_json.read(path)
        assert times["seconds_per_step"].keys() == ({"dense"} if arm.recipe is None else {"sparse", "dense"})
        times["seconds_per_step"] = {"dense": 3.0} if arm.recipe is None else {"sparse": 1.0, "dense": 8 / 3}
        times |= {"start_seconds": 10.0, "score_seconds": 2.0, "final_seconds": 1.0}
        path.write_text(json.dumps(times))
    dense, sparse = jobs(chosen, [0], "seconds", SETTINGS, tokens, tmp_path)
    assert (dense.steps, sparse.steps) == (10, 20)  # 0.7 * 1 + 0.3 * 8 / 3 is half of 3
    assert dense.path.name.endswith(".tokens.seed0.json") and sparse.path.name.endswith(".seconds.seed0.json")
    assert dense.seconds == sparse.seconds == pytest.approx(10 + SETTINGS.scores * 2 + 1 + 4 + 30)


def test_the_command_trains_and_makes_a_card(folder: Path, tmp_path: Path) -> None:
    options = ("--data-dir", folder, "--out", tmp_path, "--small", "--device", "cpu", "--steps", 10, "--arms", "bf16")
    outcome = semisparse_lab("experiment", "llama-linux", *options, "--seeds", "0,1")
    assert outcome.code == 0, outcome
    assert semisparse_lab("experiment", "llama-linux", *options, "--list").code == 0
    assert semisparse_lab("card", tmp_path).code == 0
    assert "| dense bf16 | 0, 1 | 10 |" in (tmp_path / "llama-linux.md").read_text()
    assert semisparse_lab("card", folder).code == 2


def test_the_card_of_schedules_is_made_where_a_study_lies_beside_the_runs(folder: Path, tmp_path: Path) -> None:
    options = ("--data-dir", folder, "--small", "--device", "cpu", "--steps", 10, "--arms", "bf16-24")
    sparse = ("--sparse-fraction", 1.0, "--out", tmp_path / "study-share-1.0")
    for more in (("--out", tmp_path), sparse):
        assert semisparse_lab("experiment", "llama-linux", *options, *more).code == 0
    (written,) = (tmp_path / "study-share-1.0").glob("*.json")
    run = json.loads(written.read_text())
    assert [(phase["kind"], phase["end"]) for phase in run["phases"]] == [("sparse", 10)] and run["test"] is not None
    assert semisparse_lab("card", tmp_path).code == 0
    text = (tmp_path / "llama-linux-schedules.md").read_text()
    assert f"| share-1.0 | `sparse_fraction` 0.7 → 1 | 0 | 10 | {run['validation']['bits_per_byte']:.4f} |" in text


@pytest.mark.parametrize("changes", [{"dense_start": 0.2}, {"refresh_every": 2}, {"sparse_fraction": 1.0}], ids=str)
@pytest.mark.parametrize("slug", ["fp8-24", "bf16-24"])
def test_a_schedule_compiles_each_kind_of_phase_once(
    slug: str, changes: dict[str, float], tokens: TokenSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    chosen = replace(SETTINGS, compiled=True, **changes)
    (arm,) = chosen_arms(slug, chosen.sparse_fraction, chosen.refresh_every)
    counters.clear()
    kinds = {phase.kind for phase in train_arm(arm, 0, chosen, tokens, 10).run.phases}
    assert counters["stats"]["unique_graphs"] == len(kinds) and not counters["graph_break"]


@pytest.mark.parametrize("text", ["", "x", "1,1", "-1"])
def test_wrong_seeds_and_arms_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="seeds="):
        numbers(text)
    with pytest.raises(ConfigError, match="arms="):
        chosen_arms(text or "bf16,bf16")
