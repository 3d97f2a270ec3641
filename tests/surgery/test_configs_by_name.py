"""sparsify with a mapping: exactly the named layers, each with its own settings."""

import pytest
from torch import nn

from semisparse import SemiSparseActivationLinear, SemiSparseLinear, SparseConfig, densify, sparsify
from semisparse.errors import ConfigError, LayerRefusedError, NoLayerMatchedError
from semisparse.nn import SemiSparseBase
from tests.support import config_of
from tests.surgery.models import LINEAR_NAMES, Network, Snapshot

FC1, FC2, PROJ = "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.attn.proj"
DEFAULT, ROW, ACTIVATION = SparseConfig(), SparseConfig(weight="row"), config_of("activation")


def configs(model: nn.Module) -> dict[str, SparseConfig]:
    return {name: layer.sparse_config for name, layer in model.named_modules() if isinstance(layer, SemiSparseBase)}


def test_each_named_layer_gets_its_config_and_no_other_layer_changes() -> None:
    model, wanted = Network(), {FC1: DEFAULT, FC2: ACTIVATION, PROJ: ROW}
    report = sparsify(model, wanted)
    assert configs(model) == wanted
    assert type(model.get_submodule(FC1)) is SemiSparseLinear
    assert type(model.get_submodule(FC2)) is SemiSparseActivationLinear
    assert report.configs == wanted
    assert [row.name for row in report] == [*LINEAR_NAMES, "head"]
    assert report.skipped["blocks.1.mlp.fc1"] == "not named"
    assert report.skipped["head"].startswith("not named, and could not be swapped: in_features=8")


def test_the_report_of_one_swap_is_the_mapping_of_the_next() -> None:
    model, again = Network(), Network()
    sparsify(again, sparsify(model, ROW, select="attn").configs)
    assert configs(again) == configs(model) != {}


def test_the_report_shows_the_config_of_each_layer() -> None:
    lines = str(sparsify(Network(), {FC1: DEFAULT, PROJ: ROW})).splitlines()
    shown = {line.split()[0]: line for line in lines[1:]}
    assert lines[0].split() == ["layer", "N", "x", "K", "result", "config", "why"]
    assert "transposable" in shown[FC1]
    assert "row" in shown[PROJ]
    assert "transposable" not in shown["head"]


def test_the_report_of_densify_has_no_column_for_configs() -> None:
    model = Network()
    sparsify(model)
    assert str(densify(model)).splitlines()[0].split() == ["layer", "N", "x", "K", "result", "why"]


def test_a_glob_names_every_layer_whose_whole_name_it_matches() -> None:
    model = Network()
    sparsify(model, {"blocks.*.fc1": ROW, "blocks.[1].attn.*": DEFAULT})
    assert configs(model) == {
        "blocks.0.mlp.fc1": ROW,
        "blocks.1.attn.qkv": DEFAULT,
        "blocks.1.attn.proj": DEFAULT,
        "blocks.1.mlp.fc1": ROW,
    }


@pytest.mark.parametrize("name_first", [True, False])
def test_an_exact_name_takes_precedence_over_a_glob_wherever_it_stands(name_first: bool) -> None:
    entries = [(FC1, ACTIVATION), ("*.fc?", ROW)]
    model = Network()
    sparsify(model, dict(entries if name_first else reversed(entries)))
    assert configs(model)[FC1] == ACTIVATION
    assert configs(model)[FC2] == ROW


def test_an_earlier_glob_takes_precedence_over_a_later_one() -> None:
    model = Network()
    report = sparsify(model, {"blocks.0.*": ROW, "*.fc1": DEFAULT})
    assert configs(model)["blocks.0.mlp.fc1"] == ROW
    assert configs(model)["blocks.1.mlp.fc1"] == DEFAULT
    assert not report.remarks


def test_an_entry_without_effect_is_remarked() -> None:
    report = sparsify(Network(), {"blocks.*": ROW, "*.fc1": DEFAULT})
    assert report.remarks == ("remark: config['*.fc1'] has no effect: other entries name all of its layers",)
    assert report.remarks[0] in str(report)


def test_a_glob_passes_over_layers_that_must_stay_dense_with_their_reason() -> None:
    model = Network()
    report = sparsify(model, {"*": ROW})
    assert list(configs(model)) == LINEAR_NAMES
    assert "multiples of 4" in report.skipped["head"]


def test_a_named_head_is_swapped_although_select_would_leave_it_dense() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    assert sparsify(model, {"head": DEFAULT}).swapped == ("head",)


def test_a_tied_layer_takes_the_config_of_any_of_its_names() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8)})
    report = sparsify(model, {"b": ROW, "*": DEFAULT})
    assert report.configs == {"a": ROW, "c": DEFAULT}
    assert report.skipped == {"b": "the same layer as a, swapped there"}


BAD_CALLS = {
    "nothing": (NoLayerMatchedError, "config is empty", {}),
    "unknown": (
        NoLayerMatchedError,
        r"config: 'blocks\.0\.mlp\.fc9'.*closest names: 'blocks\.0\.mlp\.fc1'",
        {FC1: ROW, "blocks.0.mlp.fc9": ROW},
    ),
    "substring": (NoLayerMatchedError, r"'mlp' matches no nn.Linear.*such as '\*mlp\*'", {"mlp": ROW}),
    "not_a_linear": (NoLayerMatchedError, "'norm' matches no nn.Linear", {"norm": ROW}),
    "glob": (NoLayerMatchedError, r"'\*\.fc3' matches no nn.Linear", {FC1: ROW, "*.fc3": ROW}),
    "refused": (
        LayerRefusedError,
        "config names 'head', which must stay dense.*out_features=10",
        {FC1: ROW, "*.fc2": ROW, "head": ROW},
    ),
    "only_refused_by_glob": (NoLayerMatchedError, "no layer of model would change.*out_features=10", {"he*": ROW}),
    "class": (ConfigError, rf"config\['{FC1}'\]=<class .* must be a SparseConfig", {FC1: SemiSparseLinear}),
    "key": (ConfigError, "config has the key 3", {3: ROW}),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_everything_is_checked_before_anything_is_changed(case: str) -> None:
    error, message, wanted = BAD_CALLS[case]
    model = Network()
    snapshot = Snapshot(model)
    with pytest.raises(error, match=message):
        sparsify(model, wanted)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("extra", [{"select": "mlp"}, {"exclude": "fc1"}, {"select": []}])
def test_a_mapping_excludes_select_and_exclude(extra: dict[str, object]) -> None:
    model = Network()
    snapshot = Snapshot(model)
    with pytest.raises(ConfigError, match="config is a mapping, which names the layers itself"):
        sparsify(model, {FC1: ROW}, **extra)
    snapshot.assert_unchanged()
