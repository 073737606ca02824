"""The table that config, command, calibration, records and reports read."""

from dataclasses import fields

import pytest
import torch
from typer.testing import CliRunner

from peft_fps import FPSConfig, Selection
from peft_fps.calibration import feed
from peft_fps.cli.app import app
from peft_fps.importance import IMPORTANCES, WITHOUT_DATA, Importance
from peft_fps.selection.calibration_record import CalibrationRecord
from tests.support.helpers import adapted, layers_of, normal, selected_columns, tiny_mlp


@pytest.mark.parametrize("name", IMPORTANCES)
def test_every_importance_is_whole(name: str):
    importance = IMPORTANCES[name]
    assert importance.name == name
    assert (importance.gather is None) == (importance.needs == "nothing") == (name in WITHOUT_DATA)
    assert {*importance.recorded} <= {field.name for field in fields(FPSConfig)}
    assert {*importance.recorded} <= {field.name for field in fields(CalibrationRecord)}
    assert importance.text(CalibrationRecord(importance=name))
    assert FPSConfig(importance=name).needs_calibration == (name not in WITHOUT_DATA)


@pytest.fixture
def distance(monkeypatch: pytest.MonkeyPatch) -> Importance:
    """An importance as somebody would add it: weights that are far from a multiple of the first input."""

    def gather(request):
        seen = {}

        def keep_first(path):
            def hook(module, args):
                seen.setdefault(path, args[0][0].clone())

            return hook

        handles = [layer.register_forward_pre_hook(keep_first(path)) for path, layer in request.layers.items()]
        for _, batch in request.data:
            feed(request.base, batch, torch.device("cpu"))
        for handle in handles:
            handle.remove()
        return seen, dict(request.data.counts)

    added = Importance(
        name="distance",
        needs="forward",
        help="far from the input",
        text=lambda record: f"distance, seed {record.seed}",
        scorer=lambda layer, path, config, first: (
            lambda start, stop: (layer.weight_rows(start, stop) - config.seed * first).abs()
        ),
        gather=gather,
        recorded=("seed",),
    )
    monkeypatch.setitem(IMPORTANCES, "distance", added)
    return added


def test_one_more_entry_is_known_everywhere(distance: Importance):
    model = adapted(tiny_mlp(), filled=False, per_neuron=2, importance="distance", seed=3, bias="none")
    batches = [normal(4, 10, seed=1), normal(4, 10, seed=2)]
    report = model.calibrate(batches, progress=False)
    assert "selected by distance, seed 3" in str(report)
    plain = tiny_mlp()
    expected = (plain.first.weight - 3 * batches[0][0]).abs().topk(2).indices.sort().values
    assert selected_columns(layers_of(model)["first"]) == expected.tolist()
    assert Selection.of(model).method["calibration"]["batches"] == 2
    with pytest.raises(ValueError, match="loss='contrastive' was given with importance='distance'"):
        FPSConfig(importance="distance", loss="contrastive")
    assert torch.equal(model.base_model.model.first.base_layer.weight, plain.first.weight)


def test_the_command_refuses_unknown_names_and_lists_those_it_knows():
    ended = CliRunner().invoke(app, ["finetune", "--importance", "guess"])
    assert ended.exit_code == 2
    assert all(name in ended.output for name in IMPORTANCES)
