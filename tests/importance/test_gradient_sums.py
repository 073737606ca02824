"""Selection by backward passes on real small models, against GPS, FISH Mask and SPT written down a second time."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_fps
from peft_fps.importance import gradient_sums
from tests.calibration.naive_fps import assert_same_selection, fresh, naive_selection, selection_of
from tests.gradients.naive_sums import (
    BACKWARD,
    CASES,
    ENABLING,
    examples_of,
    labelled_images,
    loss_in_bfloat16,
    naive_sums,
    pairs,
    plain_loss,
    texts,
    weights_of,
    with_dropout,
)
from tests.support.combinations import pairwise
from tests.support.helpers import image_batches, layers_of, normal, tiny_conv, tiny_mlp, tiny_vit, unchanged


Scores = dict[str, list[list[float]]]


@cache
def naive_scores(kind: str, importance: str, fisher: str = "example") -> Scores:
    return naive_scores_of(CASES[kind][1](), kind, importance, fisher)


def naive_scores_of(batches: list[Any], kind: str, importance: str, fisher: str = "example") -> Scores:
    """The score of every weight as the sources define it."""
    build, _, head = CASES[kind]
    if importance == "fisher":
        parts = [example for batch in batches for example in examples_of(batch)] if fisher == "example" else batches
        return {path: total.tolist() for path, total in naive_sums(build(), parts, head, square=True).items()}
    sums = naive_sums(build(), batches, head)
    if importance == "sensitivity":
        weights = {path: weight.as_matrix(weight.parameter.detach()) for path, weight in weights_of(build()).items()}
        return magnitudes({path: weights[path] * total for path, total in sums.items()})
    return magnitudes(sums)


def magnitudes(sums: dict[str, Tensor]) -> Scores:
    return {path: total.abs().tolist() for path, total in sums.items()}


def assert_selects(model: Any, scores: Scores, per_neuron: int = 3, granularity: str = "neuron") -> None:
    """The best entries by these scores are selected."""
    assert_same_selection(model, scores, naive_selection(scores, per_neuron, granularity))


def calibrated(kind: str, batches: Any = None, **options: Any) -> Any:
    """A model with a selection; options of the config, and of `calibrate` as a dict `how`."""
    build, made, _ = CASES[kind]
    how = options.pop("how", {})
    model = fresh(build(), **{"importance": "gradient", **options})
    model.calibrate(made() if batches is None else batches, progress=False, **how)
    return model


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["neuron", "layer", "model"])
@pytest.mark.parametrize("kind", CASES)
def test_gradient_is_that_of_gps(kind: str, granularity: str):
    model = calibrated(kind, granularity=granularity)
    assert_selects(model, naive_scores(kind, "gradient"), granularity=granularity)


@pytest.mark.parametrize("fisher", ["example", "batch"])
@pytest.mark.parametrize("kind", CASES)
def test_fisher_is_that_of_fish_mask_and_of_spt(kind: str, fisher: str):
    model = calibrated(kind, importance="fisher", fisher=fisher)
    assert_selects(model, naive_scores(kind, "fisher", fisher))


@pytest.mark.parametrize("kind", CASES)
def test_sensitivity_is_that_of_the_summed_gradient(kind: str):
    assert_selects(calibrated(kind, importance="sensitivity"), naive_scores(kind, "sensitivity"))


@pytest.mark.parametrize("importance", ["gradient", "sensitivity"])
def test_gradients_of_opposite_batches_cancel(importance: str):
    """Their sum counts, not the sum of their magnitudes: one input pulls the loss up in one batch, then down."""
    batches = [normal(4, 10, seed=seed) * 0.01 for seed in range(2)]
    for batch, sign in zip(batches, (1.0, -1.0), strict=True):
        batch[:, 3] = 100 * sign

    def loss(outputs: Tensor, batch: Tensor) -> Tensor:
        return outputs.sum() / len(batch)

    torch.manual_seed(0)
    model = fresh(nn.Sequential(nn.Linear(10, 4)), per_neuron=2, importance=importance, bias="none")
    model.calibrate(batches, progress=False, loss=loss)
    assert not any(3 in row for row in selection_of(model)["0"])


def two_views(images: Tensor) -> Tensor:
    return torch.cat([images, 0.8 * images.flip(3) + 0.1])


def gps(base: nn.Module, batches: list[dict[str, Tensor]]) -> Scores:
    """The selection phase of GPS: gradients of the contrastive loss of two views add up over one epoch."""
    base.requires_grad_(True)
    for batch in batches:
        states = base.vit(pixel_values=two_views(batch["pixel_values"])).last_hidden_state
        features = F.normalize(states[:, 0], dim=1)
        labels = torch.cat([batch["labels"], batch["labels"]])
        similar = features @ features.T / 0.07
        others = 1 - torch.eye(len(labels))
        positive = (labels[:, None] == labels[None]).float() * others
        log_share = similar - ((similar - similar.max()).exp() * others).sum(1, keepdim=True).log() - similar.max()
        (-(positive * log_share).sum(1) / positive.sum(1)).mean().backward()
    linear = {name: m for name, m in base.vit.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    return {f"vit.{name}": module.weight.grad.abs().flatten(1).tolist() for name, module in linear.items()}


def test_contrastive_is_that_of_gps():
    batches = [batch | {"labels": batch["labels"] % 2} for batch in labelled_images()]
    model = calibrated("vit", batches, loss="contrastive", how={"views": two_views})
    assert_selects(model, gps(tiny_vit(), batches))
    assert selection_of(model) != selection_of(calibrated("vit", batches))
    assert "contrastive loss over 12 examples" in str(model.selection_report())


def test_contrastive_with_a_head_that_the_config_names():
    batches = [(x, y % 2) for x, y in pairs((4, 10), 4)]
    model = fresh(tiny_mlp(), per_neuron=2, importance="gradient", loss="contrastive", modules_to_save=["last"])
    model.calibrate(batches, progress=False, views=lambda x: torch.cat([x, x + 0.1]))
    assert "contrastive" in model.selection_report().method


def test_contrastive_without_views_makes_its_own(monkeypatch: pytest.MonkeyPatch):
    views = Mock(side_effect=two_views)
    monkeypatch.setattr(gradient_sums, "TwoViews", lambda: views)
    calibrated("vit", loss="contrastive")
    assert views.call_count == 3


# --- invariance ------------------------------------------------------------------------------------------------------


def parts(batch: Any, size: int) -> list[Any]:
    if isinstance(batch, dict):
        pieces = {key: value.split(size) for key, value in batch.items()}
        return [dict(zip(pieces, values, strict=True)) for values in zip(*pieces.values(), strict=True)]
    return list(zip(*(part.split(size) for part in batch), strict=True))


WHOLE: dict[str, Callable[[], Any]] = {
    "vit": lambda: labelled_images(1, 8)[0],
    "conv": lambda: pairs((8, 3, 16, 16), 5, 1)[0],
    "bert": lambda: {
        key: torch.cat([batch[key] for batch in texts("classes", 2)])
        for key in ("input_ids", "attention_mask", "labels")
    },
}


@pytest.mark.parametrize("importance", BACKWARD)
@pytest.mark.parametrize("kind", WHOLE)
def test_the_order_of_batches_does_not_matter(kind: str, importance: str):
    batches = parts(WHOLE[kind](), 2)
    scores = naive_scores_of(batches, kind, importance)
    for order in (batches, batches[::-1], [*batches[1:], batches[0]]):
        assert_selects(calibrated(kind, order, importance=importance), scores)


@pytest.mark.parametrize(("kind", "importance", "size"), pairwise(WHOLE, BACKWARD, [1, 2, 4]))
def test_equal_parts_select_as_the_whole_does(kind: str, importance: str, size: int):
    whole = WHOLE[kind]()
    model = calibrated(kind, parts(whole, size), importance=importance)
    assert_selects(model, naive_scores_of([whole], kind, importance))


@pytest.mark.parametrize("size", [3, 5, 7])
def test_fisher_of_examples_is_the_same_for_any_split(size: int):
    whole = WHOLE["vit"]()
    scores = naive_scores_of([whole], "vit", "fisher")
    assert_selects(calibrated("vit", parts(whole, size), importance="fisher"), scores)
    other = calibrated("vit", parts(whole, size), importance="fisher", fisher="batch")
    with pytest.raises(AssertionError):  # which is why the paper takes single examples
        assert_selects(other, scores)


# --- losses ----------------------------------------------------------------------------------------------------------


def test_a_loss_of_ones_own():
    def loss(outputs: Any, batch: Any) -> Tensor:
        return (outputs.logits - F.one_hot(batch["labels"], 5)).square().mean()

    def step(model: nn.Module, batch: Any) -> Tensor:
        return loss(model(batch["pixel_values"]), batch)

    scores = magnitudes(naive_sums(tiny_vit(), labelled_images(), "classifier", loss=step))
    assert_selects(calibrated("vit", how={"loss": loss}), scores)
    with pytest.raises(AssertionError):
        assert_selects(calibrated("vit"), scores)


def test_cross_entropy_where_the_model_has_no_loss():
    batches = labelled_images()
    as_tuples = [(batch["pixel_values"], batch["labels"]) for batch in batches]
    named_otherwise = [{"pixel_values": batch["pixel_values"], "label": batch["labels"]} for batch in batches]
    expected = selection_of(calibrated("vit"))
    assert selection_of(calibrated("vit", as_tuples)) == expected
    assert selection_of(calibrated("vit", named_otherwise)) == expected


def exploding(outputs: Tensor, batch: Any) -> Tensor:
    """A finite loss whose gradient is not: the square root at zero."""
    return (outputs * 0).abs().sum().sqrt()


CONTRASTIVE = {"loss": "contrastive"}
BATCH = normal(2, 10)

REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], dict[str, Any], str]] = {
    # model, batches, options of the config, options of `calibrate`, message
    "no labels": (tiny_vit, [{"pixel_values": normal(2, 3, 16, 16)}], {}, {}, "no labels"),
    "a tensor": (tiny_mlp, [BATCH], {}, {}, "no labels"),
    "not a scalar": (tiny_mlp, [BATCH], {}, {"loss": lambda y, _: y}, r"shape \(2, 4\), expected a scalar"),
    "nan loss": (
        tiny_mlp,
        [BATCH, BATCH * torch.nan],
        {},
        {"loss": lambda y, _: y.sum()},
        "calibration batch 1 is nan",
    ),
    "nan gradients": (tiny_mlp, [BATCH], {}, {"loss": exploding}, "first: the gradients of its weight hold NaN"),
    "nan gradients, streaming": (
        tiny_mlp,
        [BATCH],
        {},
        {"loss": exploding, "accumulators": "streaming"},
        "first: the gradients of its weight hold NaN",
    ),
    "two losses": (tiny_vit, labelled_images(), CONTRASTIVE, {"loss": plain_loss}, "Leave one of them out"),
    "no head": (
        tiny_conv,
        pairs((4, 3, 16, 16), 5),
        CONTRASTIVE,
        {},
        "TinyConv has no classification head that is known.*modules_to_save",
    ),
    "no data": (tiny_vit, None, {}, {}, "importance='gradient' needs data"),
    "unknown memory": (tiny_vit, labelled_images(), {}, {"accumulators": "disk"}, "'disk', expected one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case: str):
    build, batches, options, how, message = REFUSED[case]
    model = fresh(build(), importance="gradient", **options)
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.calibrate(batches, progress=False, **how)
    assert not any(state.selected for layer in layers_of(model).values() for state in layer.fps_state.values())


def test_weights_that_get_no_gradients_are_refused():
    model = fresh(tiny_mlp(), importance="gradient")
    model.get_base_model().last.base_layer.to("meta")
    with pytest.raises(ValueError, match=r"last: its weight is offloaded.*importance='activation'. Nothing was"):
        model.calibrate(CASES["mlp"][1](), progress=False)
    with torch.inference_mode():
        model = fresh(tiny_mlp(), importance="gradient")
    with pytest.raises(ValueError, match=r"first: its weight was made in inference mode.*Nothing was changed"):
        model.calibrate(CASES["mlp"][1](), progress=False)


# --- where sums are held ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", BACKWARD)
@pytest.mark.parametrize("accumulators", ["device", "cpu"])
def test_sums_on_the_cpu_select_the_same(accumulators: str, importance: str):
    found = calibrated("vit", importance=importance, how={"accumulators": accumulators})
    assert selection_of(found) == selection_of(calibrated("vit", importance=importance))


@pytest.mark.parametrize("granularity", ["neuron", "layer", "model", "block"])
@pytest.mark.parametrize("importance", BACKWARD)
def test_a_shortlist_of_everything_selects_the_same(importance: str, granularity: str):
    options: dict[str, Any] = {"importance": importance, "granularity": granularity, "per_neuron": 8}
    found = calibrated("vit", **options, how={"accumulators": "streaming"})
    assert selection_of(found) == selection_of(calibrated("vit", **options))


@pytest.mark.parametrize("importance", BACKWARD)
def test_a_shortlist_selects_the_same_if_all_batches_are_alike(importance: str):
    options: dict[str, Any] = {"importance": importance, "per_neuron": 2, "fisher": "batch"}
    batches = labelled_images(1) * 3
    found = calibrated("vit", batches, **options, how={"accumulators": "streaming"})
    assert_selects(found, naive_scores_of(batches, "vit", importance, "batch"), per_neuron=2)


def test_a_shortlist_misses_what_becomes_large_later():
    base = nn.Sequential(nn.Linear(40, 3))
    first, late = normal(4, 40), normal(4, 40)
    first[:, 7] = 0.0
    late[:, 7] = 1e4
    for accumulators in ("device", "streaming"):
        for batches in ([first, late], [late, first]):
            model = fresh(copy.deepcopy(base), per_neuron=1, importance="gradient", bias="none")
            model.calibrate(batches, progress=False, accumulators=accumulators, loss=lambda y, _: y.square().mean())
            found = all(row == [7] for row in selection_of(model)["0"])
            assert found == (accumulators == "device" or batches[0] is late)


@pytest.mark.parametrize("granularity", ["model", "block"])
def test_a_shortlist_does_not_depend_on_an_earlier_selection(granularity: str):
    def scaled(factor: float) -> list[dict[str, Tensor]]:
        return [batch | {"pixel_values": batch["pixel_values"] * factor} for batch in labelled_images()]

    options: dict[str, Any] = {"granularity": granularity, "per_neuron": 2, "how": {"accumulators": "streaming"}}
    again = calibrated("vit", scaled(100.0), **options)
    counts = {path: sum(map(len, rows)) for path, rows in selection_of(again).items()}
    again.calibrate(scaled(1.0), progress=False, accumulators="streaming")
    once = calibrated("vit", scaled(1.0), **options)
    assert counts != {path: sum(map(len, rows)) for path, rows in selection_of(once).items()}
    assert selection_of(again) == selection_of(once)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"granularity": "row"}, "granularity='row'"),
        ({"granularity": "column"}, "granularity='column'"),
        ({"order": "bottom"}, "order='bottom'"),
        ({"importance": "movement"}, "importance='movement'"),
        ({"importance": "l0"}, "importance='l0'"),
        ({"order": "bottom", "granularity": "row"}, "granularity='row', order='bottom'"),
    ],
)
def test_a_shortlist_is_refused_where_it_cannot_serve(options: dict[str, Any], named: str):
    model = fresh(tiny_vit(), **{"importance": "gradient", "budget": 0.1, **options})
    with unchanged(model), pytest.raises(ValueError, match=f"'streaming' was given with {named}, expected .*'cpu'"):
        model.calibrate(labelled_images(), progress=False, accumulators="streaming")


# --- ways to run the model -------------------------------------------------------------------------------------------


@ENABLING
@pytest.mark.parametrize(
    ("kind", "training_mode", "first"),
    pairwise(["vit", "llama", "gpt2"], [False, True], ["checkpointing", "adapter"]),
)
def test_gradient_checkpointing_selects_the_same(kind: str, training_mode: bool, first: str):
    build, batches, _ = CASES[kind]
    base = build()
    if first == "checkpointing":
        base.gradient_checkpointing_enable()
    model = fresh(base, importance="gradient")
    if first == "adapter":
        model.gradient_checkpointing_enable()
    model.train()
    calls: list[bool] = []
    inner = next(m for n, m in base.named_modules() if n.endswith(("mlp.fc1", "mlp.up_proj", "mlp.c_fc")))
    inner.register_forward_pre_hook(lambda *_: calls.append(True))
    torch.manual_seed(3)
    model.calibrate(batches(), progress=False, training_mode=training_mode)
    assert len(calls) == 6
    torch.manual_seed(3)
    expected = calibrated(kind, how={"training_mode": training_mode})
    if training_mode and kind == "gpt2":  # which has dropout
        assert selection_of(model) == selection_of(expected)
    else:
        assert_selects(model, naive_scores(kind, "gradient"))


def test_training_mode_draws_dropout():
    torch.manual_seed(1)
    sums = naive_sums(with_dropout(tiny_vit(), 0.3).train(), labelled_images(), "classifier")
    model = fresh(with_dropout(tiny_vit(), 0.3), importance="gradient")
    torch.manual_seed(1)
    model.calibrate(labelled_images(), progress=False, training_mode=True)
    assert_selects(model, magnitudes(sums))


def test_bfloat16_models():
    batches = [batch | {"pixel_values": batch["pixel_values"].bfloat16()} for batch in labelled_images()]
    model = fresh(tiny_vit().bfloat16(), importance="gradient")
    model.calibrate(batches, progress=False)
    assert_selects(model, magnitudes(naive_sums(tiny_vit().bfloat16(), batches, "classifier")))


def test_autocast_around_calibration():
    sums = naive_sums(tiny_vit(), labelled_images(), "classifier", loss=loss_in_bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        model = calibrated("vit")
    assert_selects(model, magnitudes(sums))


def test_other_adapters_do_not_drive_gradients():
    model = fresh(tiny_vit(), importance="gradient")
    model.add_adapter("other", peft_fps.FPSConfig(per_neuron=2, importance="magnitude"))
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.fps_values["other"].fill_(0.3)
    model.set_adapter("other")
    model.calibrate(labelled_images(), adapter_name="default", progress=False)
    assert selection_of(model) == selection_of(calibrated("vit"))


# --- modules without gradients ---------------------------------------------------------------------------------------


class Unreached(nn.Module):
    """`idle` is not called, and what `cut` computes gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.idle, self.used, self.cut = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.cut(x).detach()


@pytest.mark.parametrize(
    ("importance", "granularity", "accumulators"),
    pairwise(BACKWARD, ["neuron", "layer", "model"], ["device", "streaming"]),
)
def test_modules_without_gradients(granularity: str, accumulators: Any, importance: str):
    model = fresh(Unreached(), per_neuron=2, importance=importance, granularity=granularity)
    named = r"2 of 3 modules were not called .* or got no gradient.*will not be trained: idle, cut\."
    with pytest.warns(UserWarning, match=named) as caught:
        model.calibrate(pairs((4, 6), 5), progress=False, accumulators=accumulators)
    assert len(caught) == 1
    found = selection_of(model)
    assert (found["idle"], found["cut"]) == ([[]] * 5, [[]] * 5)
    assert sum(map(len, found["used"])) == 2 * 5


def test_a_model_that_no_gradient_reaches_is_refused():
    model = fresh(Unreached(), per_neuron=2, importance="gradient", target_modules=["cut"])
    with unchanged(model), pytest.raises(ValueError, match="does not require grad"):
        model.calibrate(pairs((4, 6), 5), progress=False)


@pytest.mark.parametrize("accumulators", ["device", "streaming"])
@pytest.mark.parametrize("importance", BACKWARD)
def test_gradients_that_are_all_zero_are_refused(importance: str, accumulators: Any):
    model = fresh(Unreached(), per_neuron=2, importance=importance)
    with unchanged(model), pytest.raises(ValueError, match="gradients of all 1 modules are zero") as caught:
        model.calibrate(pairs((4, 6), 5), progress=False, loss=lambda y, _: 0 * y.sum(), accumulators=accumulators)
    assert ("fisher='batch'" in str(caught.value)) == (importance == "fisher")


@pytest.mark.parametrize("importance", ["movement", "l0"])
def test_weights_that_do_not_move_are_refused(importance: str):
    model = fresh(Unreached(), per_neuron=2, importance=importance, l0_penalty=0.0)
    with unchanged(model), pytest.raises(ValueError, match="are zero"):
        model.calibrate(pairs((4, 6), 5), progress=False, loss=lambda y, _: 0 * y.sum())


def test_a_run_of_ones_own():
    """Its outputs, or its loss, are what counts, on batches of any kind."""
    batches = [{"given": x, "answer": y} for x, y in pairs((4, 10), 4)]
    model, other = fresh(tiny_mlp(), importance="gradient"), fresh(tiny_mlp(), importance="gradient")
    model.calibrate(batches, progress=False, run=lambda base, b: {
        "loss": nn.functional.cross_entropy(base(b["given"]), b["answer"])})  # fmt: skip
    other.calibrate(pairs((4, 10), 4), progress=False)
    assert selection_of(model) == selection_of(other)
    model.calibrate(batches, progress=False, run=lambda base, b: base(b["given"]),
                    loss=lambda outputs, b: nn.functional.cross_entropy(outputs, b["answer"]))  # fmt: skip
    assert selection_of(model) == selection_of(other)
    assert f"over {sum(len(x) for x, _ in pairs((4, 10), 4))} examples" in model.selection_report().method


def test_two_views_and_a_run_exclude_each_other():
    model = fresh(tiny_vit(), importance="gradient", loss="contrastive")
    with unchanged(model), pytest.raises(ValueError, match=r"run was given to calibrate, but loss='contrastive'"):
        model.calibrate(image_batches(), progress=False, run=lambda base, batch: base(**batch))


# --- budget and report -----------------------------------------------------------------------------------------------


METHODS = {
    "gradient": "|sum of gradients|",
    "fisher": "squared gradients of each example",
    "sensitivity": "|weight x sum of gradients|",
}


@pytest.mark.parametrize("granularity", ["neuron", "layer", "model", "block", "row", "column"])
@pytest.mark.parametrize("importance", BACKWARD)
def test_the_budget_is_never_exceeded_and_the_report_says_how(importance: str, granularity: str):
    model = calibrated("vit", importance=importance, granularity=granularity, budget=0.06, per_neuron=None)
    report = model.selection_report()
    limit = 0.06 * sum(p.numel() for name, p in tiny_vit().named_parameters() if not name.startswith("classifier"))
    trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "fps_" in name)
    assert report.trained == trained <= limit
    assert trained > limit - 64  # one more neuron or input would not fit
    assert report.method == f"{METHODS[importance]} over 12 examples, granularity {granularity}"
    assert report.method in str(report)


def test_llama_and_bert_by_examples_of_different_length():
    """Padding and labels of -100: the mean over an example's own tokens is what its gradient is of."""
    for kind in ("llama", "bert"):
        model = calibrated(kind, importance="fisher")
        assert_selects(model, naive_scores(kind, "fisher"))
        with pytest.raises(AssertionError):
            assert_selects(model, naive_scores(kind, "fisher", "batch"))
