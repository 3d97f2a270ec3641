"""SparseCallback in the real Trainer of transformers, on models of one or two layers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import semisparse
from semisparse import recipes
from semisparse.errors import ConfigError, LayerRefusedError, ScheduleError

pytest.importorskip("transformers", minversion="5.24", reason="make test installs it")

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from semisparse.integrations.huggingface import SparseCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's own, which change with its versions
HALF = recipes.safest(sparse_fraction=0.5)
SPARSE, DENSE = ["sparse"] * 4, ["dense"] * 4


class Toy(nn.Module):
    """Two layers and a loss, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.down(self.up(x).relu()) - x).square().mean()}


class Phases(TrainerCallback):
    """The phase of each step."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        layers = semisparse.semi_sparse_layers(model).values()
        self.seen.append("sparse" if any(layer.sparse_enabled for layer in layers) else "dense")


def trainer(folder: Path, callback: SparseCallback | None, model: nn.Module | None = None, **changes: Any) -> Trainer:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8, "save_steps": 3,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "seed": 0, "disable_tqdm": True,
    }  # fmt: skip
    options = TrainingArguments(str(folder), **(settings | changes))
    data = [{"x": row} for row in torch.randn(32, 16)]
    callbacks = [Phases(), *([] if callback is None else [callback])]
    return Trainer(
        Toy() if model is None else model, options, train_dataset=data, eval_dataset=data[:4], callbacks=callbacks
    )


def phases(run: Trainer) -> list[str]:
    return next(callback.seen for callback in run.callback_handler.callbacks if isinstance(callback, Phases))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Trainer]]:
    """A whole run, with its checkpoints."""
    folder = tmp_path_factory.mktemp("full")
    run = trainer(folder, SparseCallback(HALF))
    run.train()
    yield folder, run


def test_a_run_counts_steps_not_batches_and_ends_with_plain_layers(full: tuple[Path, Trainer]) -> None:
    _, run = full
    assert phases(run) == SPARSE + DENSE
    assert type(run.model.up) is nn.Linear
    logged = [entry["semisparse/sparse"] for entry in run.state.log_history if "loss" in entry]
    assert logged == [1, 1, 1, 0, 0, 0, 0, 0]  # of the step that comes next


def test_a_callback_that_is_moved_to_the_front_reaches_every_reporter(tmp_path: Path) -> None:
    class Reporter(TrainerCallback):
        seen: tuple[float, ...] = ()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen += (logs["semisparse/applied_steps"],) if "loss" in logs else ()

    run, reporter = trainer(tmp_path, None, max_steps=2), Reporter()
    run.add_callback(reporter)
    run.add_callback(SparseCallback())
    run.callback_handler.callbacks.insert(0, run.pop_callback(SparseCallback))
    run.train()
    assert reporter.seen == (1, 2)


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_continues_bit_for_bit(full: tuple[Path, Trainer], restore: bool, tmp_path: Path) -> None:
    folder, whole = full
    run = trainer(tmp_path, SparseCallback(HALF), restore_callback_states_from_checkpoint=restore)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert phases(run) == ["sparse", *DENSE]
    ours, theirs = run.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("other", [recipes.safest(sparse_fraction=0.75), recipes.sr_ste(sparse_fraction=0.5)])
def test_a_checkpoint_of_another_recipe_is_refused(
    full: tuple[Path, Trainer], other: recipes.Recipe, tmp_path: Path
) -> None:
    run = trainer(tmp_path, SparseCallback(other))
    with pytest.raises(ScheduleError, match="state was saved with recipe="):
        run.train(resume_from_checkpoint=str(full[0] / "checkpoint-3"))


def test_a_dense_run_can_be_continued_sparse_and_saved(tmp_path: Path) -> None:
    trainer(tmp_path, None).train()
    run = trainer(tmp_path, SparseCallback(HALF))
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert phases(run) == ["sparse", *DENSE]
    assert (tmp_path / "checkpoint-6").exists()


def test_training_again_begins_anew_also_with_hooks_on_the_optimizer_that_accelerate_wraps(tmp_path: Path) -> None:
    run = trainer(tmp_path, SparseCallback(recipes.sr_ste(sparse_fraction=0.5)))
    run.train()
    run.train()
    assert phases(run) == 2 * (SPARSE + DENSE)


def test_a_step_that_the_scaler_skipped_does_not_count(tmp_path: Path) -> None:
    class Overflows(Toy):
        batches = 0

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            self.batches += 1
            return {"loss": super().forward(x)["loss"] * (torch.inf if self.batches == 3 else 1)}

    callback = SparseCallback(HALF)
    run = trainer(tmp_path, callback, Overflows(), max_grad_norm=0)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # as with fp16 on a GPU
    run.train()
    assert callback.schedule is not None
    assert callback.schedule.applied_steps == 7
    assert phases(run).count("sparse") == 5


def test_a_model_that_was_compiled_and_evaluated_before_the_swap_trains_sparse(tmp_path: Path) -> None:
    run = trainer(tmp_path, SparseCallback(HALF), torch_compile=True, torch_compile_backend="eager")
    compiled = torch.compile(run.model, backend="eager")
    before = compiled(run.eval_dataset[0]["x"])["loss"]
    run.train()
    assert phases(run) == SPARSE + DENSE
    semisparse.sparsify(run.model)
    assert compiled(run.eval_dataset[0]["x"])["loss"] != before


def test_a_model_that_has_semi_sparse_layers_keeps_its_own(tmp_path: Path) -> None:
    model = Toy()
    semisparse.sparsify(model, {"up": semisparse.SparseConfig()})
    callback = SparseCallback(HALF, at_end=None)
    trainer(tmp_path, callback, model).train()
    assert list(semisparse.semi_sparse_layers(model)) == ["up"]


def test_save_pretrained_gives_what_a_plain_model_loads(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes))
    run = trainer(tmp_path, SparseCallback(at_end="masked"), model, max_steps=2)
    run.train_dataset = [{"input_ids": row, "labels": row} for row in torch.randint(32, (16, 8))]
    tokens = torch.arange(8)[None]
    run.train()
    run.save_model(str(tmp_path / "out"))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    report = semisparse.check_checkpoint(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.weight" in str(report)
    up = loaded.model.layers[0].mlp.up_proj.weight
    assert (up == 0).float().mean() == 0.5


def test_two_in_one_trainer_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, SparseCallback())
    run.add_callback(SparseCallback())
    with pytest.raises(ScheduleError, match="two SparseCallbacks"):
        run.train()


def test_one_in_two_trainers_at_once_is_refused(tmp_path: Path) -> None:
    callback = SparseCallback()

    class Inner(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer(tmp_path, callback, max_steps=1).train()

    run = trainer(tmp_path, callback)
    run.add_callback(Inner())
    with pytest.raises(ScheduleError, match="another Trainer"):
        run.train()


def test_layers_that_could_not_be_made_dense_are_refused_before_training(tmp_path: Path) -> None:
    model = Toy()
    semisparse.sparsify(model)
    model.up.forward = model.up.forward  # as accelerate's hooks do
    run = trainer(tmp_path, SparseCallback(), model)
    with pytest.raises(LayerRefusedError, match="up could not be made dense at the end"):
        run.train()
    assert phases(run) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"recipe": "safest"}, "must be a Recipe"),
        ({"recipe": recipes.fst()}, "trainer_state.json holds no tensors"),
        ({"recipe": recipes.s_ste()}, "trainer_state.json holds no tensors"),
        ({"at_end": "sparse"}, "at_end='sparse' is not one of"),
        ({"select": len}, "must be a string or a list of strings"),
        ({"exclude": []}, "must be a string or a list of strings"),
    ],
)
def test_an_argument_that_is_none_of_its_values_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SparseCallback(**arguments)
