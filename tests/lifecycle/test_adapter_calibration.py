"""Calibration and reports on real small models, against FPS written down a second time."""

import copy
import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import peft_fps
from peft_fps import FPSConfig
from peft_fps.layers.fps_layer import FPSLayer
from tests.calibration.naive_fps import (
    KINDS,
    MODELS,
    Rows,
    assert_same_selection,
    fresh,
    naive_scores,
    naive_selection,
    padded_batches,
    selection_of,
)
from tests.support.helpers import (
    bits,
    fill,
    image_batches,
    images,
    layers_of,
    normal,
    through_transformers,
    tiny_conv,
    tiny_gpt2,
    tiny_mlp,
    tiny_vit,
    unchanged,
)


def calibrated(kind: str, **options: Any) -> Any:
    build, batches, _ = MODELS[kind]
    model = fresh(build(), **options)
    model.calibrate(batches(), progress=False)
    return model


EVERY = list(product(("l1", "l2"), (True, False), ("neuron", "layer", "model")))
SOME = [("l1", True, "neuron"), ("l2", True, "layer"), ("l1", False, "model")]


@pytest.mark.parametrize(
    ("kind", "norm", "weight_magnitude", "granularity"),
    [("conv", *options) for options in EVERY]
    + [(kind, *options) for kind in MODELS if kind != "conv" for options in SOME],
)
def test_the_selection_is_that_of_fps(kind: str, norm: str, weight_magnitude: bool, granularity: str):
    build, batches, head = MODELS[kind]
    scores = naive_scores(build(), batches(), head, norm, weight_magnitude)
    found = calibrated(kind, norm=norm, weight_magnitude=weight_magnitude, granularity=granularity)
    assert_same_selection(found, scores, naive_selection(scores, 3, granularity))


@pytest.mark.parametrize("k", [0.4, 1, 2.5, 20, 1000])
@pytest.mark.parametrize("kind", ["conv", "gpt2"])
def test_any_number_of_entries_per_neuron(kind: str, k: float):
    build, batches, head = MODELS[kind]
    scores = naive_scores(build(), batches(), head)
    found = calibrated(kind, per_neuron=k)
    assert_same_selection(found, scores, naive_selection(scores, k, "neuron"))


def test_a_budget_is_met_after_calibration():
    model = calibrated("vit", budget=0.05)
    parameters = sum(p.numel() for name, p in tiny_vit().named_parameters() if not name.startswith("classifier"))
    trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "fps_" in name)
    report = model.selection_report()
    limit = int(parameters * 0.05)
    assert limit - len(layers_of(model)) < trained <= limit
    assert (report.trained, report.base_parameters) == (trained, parameters)
    assert report.share == trained / parameters


def test_magnitude_and_random_need_no_data():
    for importance in ("magnitude", "random"):
        model = fresh(tiny_conv(), importance=importance, seed=3)
        before = selection_of(model)
        assert model.calibrate(progress=False).entries == 3 * (8 + 12 + 6 + 5)
        assert selection_of(model) == before
    base = tiny_conv()
    scores = {n: m.weight.flatten(1).abs().tolist() for n, m in base.named_modules() if isinstance(m, KINDS)}
    found = selection_of(fresh(tiny_conv(), importance="magnitude"))
    assert found == naive_selection(scores, 3, "neuron")


def test_a_seed_gives_one_random_selection():
    def drawn(seed: int) -> dict[str, Rows]:
        return selection_of(fresh(tiny_vit(), importance="random", seed=seed))

    torch.manual_seed(0)
    one = drawn(1)
    torch.manual_seed(5)
    assert drawn(1) == one
    assert drawn(2) != one
    assert len({str(rows) for name, rows in one.items() if name.endswith("q_proj")}) == 2  # each layer its own


def test_before_calibration_magnitude_selects():
    base = tiny_mlp()
    scores = {n: m.weight.abs().tolist() for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    assert selection_of(fresh(tiny_mlp())) == naive_selection(scores, 3, "neuron")


# --- data -----------------------------------------------------------------------------------------------------------


def pixel_loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(images(10), torch.arange(10)), batch_size=4, **options)


def dataset() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"pixel_values": images(10).tolist(), "name": [str(i) for i in range(10)]})


def stack(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([torch.as_tensor(example["pixel_values"]) for example in examples])}


PARTS = images(10).split(4)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        pytest.param(pixel_loader, {}, id="loader-of-tuples"),
        pytest.param(
            lambda: [{"pixel_values": part, "labels": torch.arange(len(part))} for part in PARTS], {}, id="dicts"
        ),
        pytest.param(lambda: [(part, "labels") for part in PARTS], {}, id="tuples"),
        pytest.param(lambda: list(PARTS), {}, id="tensors"),
        pytest.param(lambda: iter(PARTS), {}, id="iterator"),
        pytest.param(lambda: dataset().remove_columns("name"), {"batch_size": 4}, id="dataset"),
        pytest.param(dataset, {"batch_size": 4, "collator": stack}, id="dataset-and-collator"),
        pytest.param(lambda: [images(10)], {}, id="one-batch"),
    ],
)
def test_data_of_any_kind_gives_one_selection(data: Callable[[], Any], options: dict[str, Any]):
    scores = naive_scores(tiny_vit(), [images(10)], "classifier")
    model = fresh(tiny_vit())
    report = model.calibrate(data(), progress=False, **options)
    assert_same_selection(model, scores, naive_selection(scores, 3, "neuron"))
    assert "over 10 examples" in str(report)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_num_batches(count: int):
    drawn = []

    def data() -> Iterator[Tensor]:
        for seed in range(3):
            drawn.append(seed)
            yield images(4, seed)

    model = fresh(tiny_vit())
    model.calibrate(data(), num_batches=count, progress=False)
    used = min(count, 3)
    assert len(drawn) == used  # not one more than needed
    assert f"over {4 * used} examples" in str(model.selection_report())
    scores = naive_scores(tiny_vit(), [images(4, seed) for seed in range(used)], "classifier")
    assert_same_selection(model, scores, naive_selection(scores, 3, "neuron"))


def test_the_first_layers_selection_does_not_depend_on_the_split():
    found = []
    for size in (1, 3, 10):
        model = fresh(tiny_vit(), per_neuron=5)
        model.calibrate(list(images(10).split(size)), progress=False)
        found.append([selection for name, selection in selection_of(model).items() if "patch_embeddings" in name])
    assert len(found[0]) == 1
    assert found[0] == found[1] == found[2]


def test_the_same_call_gives_the_same_selection():
    one, other = calibrated("vit"), calibrated("vit")
    for name, layer in layers_of(one).items():
        same = layers_of(other)[name]
        assert bits(layer.fps_columns["default"]) == bits(same.fps_columns["default"])
        assert bits(layer.fps_row_counts["default"]) == bits(same.fps_row_counts["default"])


def test_padding_matters():
    batches = padded_batches()
    scores = naive_scores(tiny_gpt2(), [{"input_ids": batch["input_ids"]} for batch in batches], "lm_head")
    with pytest.raises(AssertionError):
        assert_same_selection(calibrated("gpt2"), scores, naive_selection(scores, 3, "neuron"))


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar(shown: bool, capsys: pytest.CaptureFixture[str]):
    fresh(tiny_vit()).calibrate(image_batches(2), progress=shown)
    output, errors = capsys.readouterr()
    assert output == ""
    assert ("Calibrating" in errors and "2/2" in errors) is shown


def test_what_follows_draws_the_same_random_numbers():
    def shuffled_epoch(calibrate: bool) -> list[int]:
        torch.manual_seed(1)
        loader = pixel_loader(shuffle=True)
        if calibrate:
            fresh(tiny_vit()).calibrate(loader, progress=False)
        return [label for _, labels in loader for label in labels.tolist()]

    assert shuffled_epoch(True) == shuffled_epoch(False)


# --- half precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_models(dtype: torch.dtype):
    batches = [{"pixel_values": batch["pixel_values"].to(dtype)} for batch in image_batches()]
    scores = naive_scores(tiny_vit().to(dtype), batches, "classifier")
    model = fresh(tiny_vit().to(dtype))
    model.calibrate(batches, progress=False)
    assert_same_selection(model, scores, naive_selection(scores, 3, "neuron"))
    assert {layer.fps_values["default"].dtype for layer in layers_of(model).values()} == {torch.float32}
    assert {layer.fps_columns["default"].dtype for layer in layers_of(model).values()} == {torch.int32}


def test_columns_that_bfloat16_cannot_hold():
    batches = [normal(4, 3000, seed=seed).bfloat16() for seed in range(2)]
    base = tiny_mlp(inputs=3000, hidden=6).bfloat16()
    scores = naive_scores(base, batches, "no head")
    model = fresh(tiny_mlp(inputs=3000, hidden=6).bfloat16(), per_neuron=40)
    model.calibrate(batches, progress=False)
    model.set_adapter("default")
    model.bfloat16()
    expected = naive_selection(scores, 40, "neuron")
    assert_same_selection(model, scores, expected)
    columns = [column for row in selection_of(model)["first"] for column in row]
    assert any(column > 2048 and column % 2 for column in columns)


# --- several adapters -----------------------------------------------------------------------------------------------


def test_adapters_are_calibrated_separately():
    model = fresh(tiny_vit())
    model.add_adapter("other", FPSConfig(per_neuron=2, norm="l2"))
    one, two = image_batches(seed=0), [{"pixel_values": 5 * normal(4, 3, 16, 16, seed=7).abs()}]
    model.calibrate(one, adapter_name="default", progress=False)
    first = selection_of(model)
    report = model.calibrate(two, adapter_name="other", progress=False)
    assert selection_of(model) == first
    assert report.entries == model.selection_report("other").entries
    assert model.selection_report().entries * 2 == report.entries * 3
    for batches, norm, k, name in ((one, "l1", 3, "default"), (two, "l2", 2, "other")):
        scores = naive_scores(tiny_vit(), batches, "classifier", norm)
        assert_same_selection(model, scores, naive_selection(scores, k, "neuron"), name)


def test_other_adapters_do_not_drive_the_activations():
    model = fresh(tiny_vit())
    model.add_adapter("other", FPSConfig(per_neuron=2, importance="magnitude"))
    fill(model, "other")
    model.set_adapter("other")
    model.calibrate(image_batches(), adapter_name="default", progress=False)
    assert selection_of(model) == selection_of(calibrated("vit"))
    assert model.active_adapters == ["other"]


@through_transformers
def test_adapters_of_transformers_itself():
    model = tiny_vit()
    model.add_adapter(FPSConfig(per_neuron=3))
    peft_fps.calibrate(model, image_batches(), progress=False)
    scores = naive_scores(tiny_vit(), image_batches(), "classifier")
    assert_same_selection(model, scores, naive_selection(scores, 3, "neuron"))


def test_which_adapter():
    model = fresh(tiny_mlp())
    model.add_adapter("other", FPSConfig(per_neuron=1))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"active adapters \['default', 'other'\], expected one.*adapter_name"):
        model.calibrate([normal(2, 10)])
    with pytest.raises(ValueError, match=r"'missing', expected one of \['default', 'other'\]"):
        model.calibrate([normal(2, 10)], adapter_name="missing")
    with pytest.raises(ValueError, match="no active FPS adapter"):
        peft_fps.calibrate(tiny_mlp(), [normal(2, 10)])


# --- refusals leave everything as it was ----------------------------------------------------------------------------


def broken_data() -> Iterator[dict[str, Tensor]]:
    yield from image_batches(1)
    raise OSError("the disk is gone")


def not_finite() -> list[dict[str, Tensor]]:
    batches = image_batches(2)
    batches[1]["pixel_values"][2, 0, 3, 3] = torch.nan
    return batches


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        pytest.param(lambda: [], {}, ValueError, "holds no batch", id="empty"),
        pytest.param(lambda: iter(()), {}, ValueError, "holds no batch", id="empty-iterator"),
        pytest.param(lambda: None, {}, ValueError, "needs data, found None", id="no-data"),
        pytest.param(image_batches, {"num_batches": 0}, ValueError, "num_batches is 0", id="no-batches"),
        pytest.param(lambda: image_batches()[0], {}, TypeError, "single dict.*into a list", id="a-batch"),
        pytest.param(images, {}, TypeError, "single Tensor", id="a-tensor"),
        pytest.param(lambda: 3, {}, TypeError, "of type int", id="a-number"),
        pytest.param(lambda: ["text"], {}, TypeError, "batch is of type str", id="text"),
        pytest.param(broken_data, {}, OSError, "the disk is gone", id="data-fails"),
        pytest.param(lambda: [normal(2, 3, 5, 5)], {}, ValueError, "image size", id="model-fails"),
        pytest.param(not_finite, {}, ValueError, r"projection: .*NaN or infinity.*batch 1", id="not-finite"),
        pytest.param(image_batches, {"adapter_name": "other"}, ValueError, "no FPS adapter named 'other'", id="name"),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_refusal_changes_nothing(
    data: Callable[[], Any], options: dict[str, Any], error: type[Exception], message: str, training: bool
):
    model = fresh(tiny_vit())
    model.train(training)
    model.base_model.model.classifier.eval()
    with unchanged(model), pytest.raises(error, match=message):
        model.calibrate(data(), progress=False, **options)
    assert not any(state.selected for layer in layers_of(model).values() for state in layer.fps_state.values())


def test_a_merged_model_is_refused():
    model = calibrated("vit")
    fill(model)
    model.merge_adapter()
    with unchanged(model), pytest.raises(ValueError, match=r"merged adapters \['default'\].*unmerge_adapter"):
        model.calibrate(image_batches(), progress=False, discard_values=True)


@pytest.mark.parametrize("part", ["fps_values", "fps_bias"])
def test_a_trained_adapter_is_refused_unless_its_values_may_go(part: str):
    model = fresh(tiny_vit())
    *_, last = layers_of(model).values()
    with torch.no_grad():
        getattr(last, part)["default"][-1] = 1e-30
    with unchanged(model), pytest.raises(ValueError, match="holds trained changes.*discard_values=True"):
        model.calibrate(image_batches(), progress=False)
    held = {name: parameter for name, parameter in model.named_parameters() if "fps_" in name}
    model.calibrate(image_batches(), progress=False, discard_values=True)
    assert selection_of(model) == selection_of(calibrated("vit"))
    after = {name: parameter for name, parameter in model.named_parameters() if "fps_" in name}
    assert all(after[name] is parameter for name, parameter in held.items())  # an optimizer may hold them
    assert not any(parameter.any() for parameter in after.values())


def test_success_changes_the_adapter_only():
    model = fresh(tiny_vit()).train()
    before = {name: bits(tensor) for name, tensor in model.state_dict().items() if "fps_" not in name}
    flags = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}
    hooks = {name: list(module._forward_pre_hooks) for name, module in model.named_modules()}
    model.calibrate(image_batches(), progress=False)
    assert {name: bits(tensor) for name, tensor in model.state_dict().items() if "fps_" not in name} == before
    assert {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()} == flags
    assert all(module.training for module in model.modules())
    assert {name: list(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks


def test_disabled_adapters_stay_disabled():
    model = fresh(tiny_vit())
    model.base_model.disable_adapter_layers()
    model.calibrate(image_batches(), adapter_name="default", progress=False)
    assert all(layer.disable_adapters for layer in layers_of(model).values())
    assert selection_of(model) == selection_of(calibrated("vit"))


def test_calibration_in_inference_mode():
    model = fresh(tiny_vit())
    with torch.inference_mode():
        model.calibrate(image_batches(), progress=False)
    assert selection_of(model) == selection_of(calibrated("vit"))
    model.train()(**image_batches()[0]).logits.sum().backward()


# --- modules without input ------------------------------------------------------------------------------------------


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.spare = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def naive_scores_of_used(base: Unreached, batches: list[Tensor], weight_magnitude: bool) -> list[list[float]]:
    activation = torch.cat(batches).double().abs().mean(0)
    weight = base.used.weight.detach().double().abs()
    return (weight * activation if weight_magnitude else activation.expand(weight.shape)).tolist()


@pytest.mark.parametrize("weight_magnitude", [True, False], ids=["", "activation-alone"])
@pytest.mark.parametrize("granularity", ["neuron", "layer"])
def test_unreached_modules_are_named_and_hold_nothing(weight_magnitude: bool, granularity: str):
    torch.manual_seed(0)
    base = Unreached()
    batches = [normal(3, 6, seed=seed) for seed in range(2)]
    scores = naive_scores_of_used(copy.deepcopy(base), batches, weight_magnitude)
    model = fresh(base, per_neuron=2, weight_magnitude=weight_magnitude, granularity=granularity)
    with pytest.warns(UserWarning, match=r"2 of 3 modules saw no input.*not be trained: idle, spare.*per_neuron"):
        report = model.calibrate(batches, progress=False)
    nothing: dict[str, Rows] = {"idle": [[]] * 5, "spare": [[]] * 4}
    assert selection_of(model) == naive_selection({"used": scores}, 2, granularity) | nothing
    assert [row.module for row in report.layers] == ["used"]
    assert report.trained == 2 * 5 + 5


# --- state and report -----------------------------------------------------------------------------------------------


def test_training_without_calibration_warns_once():
    model = fresh(tiny_mlp()).train()
    with pytest.warns(UserWarning, match=r"without calibration.*model.calibrate\(train_dataloader\)") as caught:
        model(normal(2, 10)).sum().backward()
    assert len(caught) == 1  # of two layers
    model(normal(2, 10)).sum().backward()


@pytest.mark.parametrize(
    "options",
    [{"importance": "magnitude"}, {"importance": "random"}, {"budget": 0}],
    ids=["magnitude", "random", "bitfit"],
)
def test_no_warning_where_no_calibration_is_due(options: dict[str, Any]):
    fresh(tiny_mlp(), **options).train()(normal(2, 10)).sum().backward()


def test_no_warning_after_calibration_or_in_evaluation():
    model = fresh(tiny_mlp())
    model.eval()(normal(2, 10))
    with torch.no_grad():
        model.train()(normal(2, 10))
    model.calibrate([normal(2, 10)], progress=False)
    model.train()(normal(2, 10)).sum().backward()
    copy.deepcopy(model)(normal(2, 10)).sum().backward()


@pytest.mark.parametrize("granularity", ["neuron", "layer", "model"])
def test_report_of_a_vit(granularity: str):
    model = calibrated("vit", granularity=granularity)
    report = model.selection_report()
    neurons, keys = 32 + 2 * (4 * 32 + 64 + 32), 2 * 32  # softmax cancels the biases of keys
    weights = 32 * 48 + 2 * (4 * 32 * 32 + 2 * 32 * 64)
    others = 32 + 17 * 32 + 5 * 64  # class token, position embedding, layer norms
    assert len(report.layers) == 13
    assert (report.entries, report.biases) == (3 * neurons, neurons - keys)
    assert (report.base_parameters, report.head_parameters) == (weights + neurons + others, 32 * 5 + 5)
    assert report.share == (4 * neurons - keys) / (weights + neurons + others)
    assert report.share_with_head == (4 * neurons - keys + 165) / (weights + neurons + others)
    assert report.bytes == 3 * neurons * (4 + 2) + neurons * (1 + 4) + 165 * 4
    counts = {name: sum(map(len, rows)) for name, rows in selection_of(model).items()}
    assert {row.module: row.entries for row in report.layers} == counts
    text = str(report)
    assert f"weight magnitude x mean |input| over 12 examples, granularity {granularity}" in text
    assert f"{report.entries:,}" in text
    assert report.budget is None


@pytest.mark.parametrize(
    ("options", "calibrate", "method"),
    [
        ({}, False, "weight magnitude until calibrated"),
        ({"importance": "magnitude"}, False, "weight magnitude"),
        ({"importance": "random", "seed": 4}, False, "chance (seed 4)"),
        ({"norm": "l2"}, True, "weight magnitude x root mean square of the input over 2 examples"),
        ({"weight_magnitude": False}, True, "mean |input| over 2 examples"),
    ],
    ids=["uncalibrated", "magnitude", "random", "l2", "activation-alone"],
)
def test_report_says_how(options: dict[str, Any], calibrate: bool, method: str):
    model = fresh(tiny_mlp(), **options)
    report = model.calibrate([normal(2, 10)], progress=False) if calibrate else model.selection_report()
    assert report.method == f"{method}, granularity neuron"


def saved_config(model: peft.PeftModel, folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text())


def test_a_saved_config_says_how_the_entries_were_chosen_and_how_many(tmp_path: Path):
    model = calibrated("vit", norm="l2", granularity="model")
    saved = saved_config(model, tmp_path)
    assert saved["record"]["calibration"] == {
        "importance": "activation",
        "order": "top",
        "granularity": "model",
        "seed": 0,
        "norm": "l2",
        "weight_magnitude": True,
        "batches": 3,
        "examples": 12,
    }
    counts = {name: sum(map(len, rows)) for name, rows in selection_of(model).items()}
    assert {name: sizes["entries"] for name, sizes in saved["record"]["allocation"].items()} == counts
    assert saved["record"]["allocation"]["vit.layers.1.mlp.fc2"]["neurons"] == 32
    assert saved["record"]["allocation"]["vit.layers.1.mlp.fc2"]["inputs"] == 64


def test_one_config_serves_several_models(tmp_path: Path):
    config = FPSConfig(per_neuron=3)
    models = [get_peft_model(build(), config) for build in (tiny_vit, tiny_mlp, tiny_conv)]
    models[0].calibrate(image_batches(), progress=False)
    assert selection_of(models[0]) == selection_of(calibrated("vit"))
    assert [selection_of(model) for model in models[1:]] == [selection_of(fresh(b())) for b in (tiny_mlp, tiny_conv)]
    for i, model in enumerate(models):
        saved = saved_config(model, tmp_path / str(i))
        assert set(saved["record"]["allocation"]) == set(layers_of(model))
        assert (saved["record"]["calibration"] is None) == (i > 0)


def test_layers_know_their_path():
    model = fresh(tiny_vit())
    assert all(layer.module_path == name for name, layer in layers_of(model).items())
    assert all(isinstance(layer, FPSLayer) for layer in layers_of(model).values())
    assert isinstance(model, peft.PeftModel)


@pytest.mark.parametrize("importance", ["gradient", "movement"])
def test_an_adapter_that_is_not_active_is_calibrated_with_its_own_head(importance: str):
    batches = [batch | {"labels": torch.tensor([0, 1, 2, 3])} for batch in image_batches()]
    selections = []
    for active in ("default", "second"):
        model = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2, importance=importance))
        model.add_adapter("second", FPSConfig(per_neuron=2, importance=importance))
        with torch.no_grad():  # its own head differs from the other adapter's
            model.base_model.model.classifier.modules_to_save["second"].weight.neg_()
        model.set_adapter(active)
        trainable = [parameter.requires_grad for parameter in model.parameters()]
        torch.manual_seed(0)
        model.calibrate(batches, adapter_name="second", progress=False)
        assert model.base_model.model.classifier.active_adapters == [active]
        assert [parameter.requires_grad for parameter in model.parameters()] == trainable
        selections.append(selection_of(model, "second"))
    assert selections[0] == selections[1]
