"""Combined adapters are what PEFT's merging functions make of the dense changes, and adapters like any other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from peft.utils import merge_utils
from torch import Tensor, nn

from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.lifecycle.combination import Combination, combine, united_entries
from peft_fps.sparse import Layout, build_structure
from tests.support.helpers import (
    adapted,
    base_bytes,
    bits,
    config,
    csr,
    dense_change,
    dense_reference,
    fill,
    images,
    layers_of,
    normal,
    output,
    selected_columns,
    selections,
    tiny_conv,
    tiny_gpt2,
    tiny_mlp,
    tiny_vit,
    tokens,
    unchanged,
)


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

DETERMINISTIC = ("linear", "cat", "ties", "magnitude_prune")
PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
WEIGHTS = [0.7, -1.3]


def density_for(combination_type: str) -> float | None:
    return 0.5 if combination_type in PRUNED else None


def by_peft(
    changes: list[Tensor], weights: list[float], how: str, kept: int | None, majority: str = "total"
) -> Tensor:
    """PEFT's own functions on dense changes, whose density keeps the `kept` largest numbers of each."""
    factors = torch.tensor(weights, dtype=changes[0].dtype)
    if how in ("linear", "cat"):
        return merge_utils.task_arithmetic(changes, factors)
    density = (kept + 0.5) / changes[0].numel()
    if how == "magnitude_prune":
        return merge_utils.magnitude_prune(changes, factors, density)
    return merge_utils.ties(changes, factors, density, majority)


# --- tensors --------------------------------------------------------------------------------------------------------


@given(st.data())
def test_the_union_holds_every_entry_once_and_knows_where_each_went(data: st.DataObject) -> None:
    inputs, rows = data.draw(selections())
    row = st.sets(st.integers(0, inputs - 1)).map(sorted)
    others = data.draw(st.lists(row, min_size=len(rows), max_size=len(rows)))
    transposed = data.draw(st.booleans())
    structures = [build_structure(*csr(each), len(rows), inputs, Layout(transposed)) for each in (rows, others)]
    columns, row_counts, places = united_entries(structures)
    union = [sorted({*one, *other}) for one, other in zip(rows, others, strict=True)]
    flat = [(i, column) for i, row in enumerate(union) for column in row]
    assert columns.tolist() == [column for _, column in flat]
    assert row_counts.tolist() == [len(row) for row in union]
    assert columns.dtype == row_counts.dtype == torch.int32
    for each, place in zip((rows, others), places, strict=True):
        assert [flat[i] for i in place.tolist()] == [(i, column) for i, row in enumerate(each) for column in row]


def sparse_changes(count: int, size: int, own: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    places = [
        torch.randperm(size, generator=torch.Generator().manual_seed(i))[:own].sort().values for i in range(count)
    ]
    return [normal(own, seed=10 + i, dtype=dtype) for i in range(count)], places


@pytest.mark.parametrize("how", DETERMINISTIC)
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.5, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:The density:UserWarning")
def test_combinations_are_those_of_peft_on_dense_changes(
    how: str, majority: str, density: float, dtype: torch.dtype
) -> None:
    weights, size, own = [0.7, -1.3, 2.0], 40, 17
    changes, places = sparse_changes(3, size, own, dtype)
    dense = [torch.zeros(size, dtype=dtype).index_copy(0, p, c) for c, p in zip(changes, places, strict=True)]
    found = combine(changes, places, size, Combination(list("abc"), weights, how, density, majority))
    assert found.dtype == dtype
    torch.testing.assert_close(found, by_peft(dense, weights, how, int(density * own), majority))


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_random_drops_are_those_of_peft_on_each_adapters_own_entries(how: str, majority: str) -> None:
    weights, size, density = [0.7, -1.3, 2.0], 40, 0.4
    changes, places = sparse_changes(3, size, 17, torch.float32)
    torch.manual_seed(3)
    found = combine(changes, places, size, Combination(list("abc"), weights, how, density, majority))
    torch.manual_seed(3)
    dropped = [merge_utils.prune(change, density, "random", rescale=True) for change in changes]
    dense = torch.stack([torch.zeros(size).index_copy(0, p, c) for c, p in zip(dropped, places, strict=True)])
    weighted = dense * torch.tensor(weights)[:, None]
    expected = weighted.sum(0)
    if how == "dare_ties":
        mask = merge_utils.calculate_majority_sign_mask(dense, method=majority)
        expected = merge_utils.disjoint_merge(weighted, mask)
    torch.testing.assert_close(found, expected)
    assert 0 < int((found == 0).sum()) < size


def test_random_drops_keep_the_expected_change() -> None:
    change, count = torch.full((20_000,), 3.0), 20_000
    torch.manual_seed(0)
    found = combine([change], [torch.arange(count)], count, Combination(["a"], [0.5], "dare_linear", 0.2))
    kept = found != 0
    # 4 standard deviations of a binomial share around 0.2
    assert abs(float(kept.float().mean()) - 0.2) < 4 * (0.2 * 0.8 / count) ** 0.5
    assert torch.equal(found[kept], torch.full_like(found[kept], 0.5 * 3.0 / 0.2))


def test_half_precision_changes_are_summed_in_float32() -> None:
    changes, places = sparse_changes(2, 9, 5, torch.bfloat16)
    found = combine(changes, places, 9, Combination(list("ab"), WEIGHTS))
    dense = [torch.zeros(9).index_copy(0, p, c.float()) for c, p in zip(changes, places, strict=True)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, WEIGHTS[0] * dense[0] + WEIGHTS[1] * dense[1])


def test_an_adapter_may_have_no_entries() -> None:
    nothing = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    some = torch.tensor([1.0, -2.0]), torch.tensor([0, 2])
    for how in ("linear", *PRUNED):
        found = combine([nothing[0], some[0]], [nothing[1], some[1]], 3, Combination(list("ab"), [1, 2], how, 1))
        torch.testing.assert_close(found, torch.tensor([2.0, 0.0, -4.0]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("a", [1]), TypeError, "adapters is 'a', expected a list"),
        ((["a", 1], [1, 1]), TypeError, "expected a list of adapter names"),
        (([], []), ValueError, "adapters is empty"),
        ((["a"], 1), TypeError, "weights is 1, expected a list"),
        ((["a"], ["1"]), TypeError, "weights holds '1' of type str"),
        ((["a"], [True]), TypeError, "weights holds True"),
        ((["a"], [float("nan")]), ValueError, "weights holds nan, expected finite"),
        ((["a"], [1, 2]), ValueError, "weights has 2 numbers, expected one for each of the 1 adapters"),
        ((["a"], [1], "svd"), ValueError, "combination_type is 'svd', expected one of 'linear', 'cat', 'ties'"),
        ((["a"], [1], "ties", 0.5, "mean"), ValueError, "majority_sign_method is 'mean', expected one of 'total'"),
        ((["a"], [1], "ties"), ValueError, "density is None, expected a number above 0 and at most 1 with.*'ties'"),
        ((["a"], [1], "dare_linear", "1"), TypeError, "density is '1' of type str"),
        ((["a"], [1], "dare_linear", 0), ValueError, "density is 0, expected a number above 0 and at most 1"),
        ((["a"], [1], "linear", 1.1), ValueError, "density is 1.1"),
        ((["a"], [1], "linear", float("nan")), ValueError, "density is nan"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    adapters = list(arguments[0]) if isinstance(arguments[0], list) else arguments[0]
    with pytest.raises(error, match=message):
        Combination(adapters, *arguments[1:])
    model = two(tiny_mlp)
    with unchanged(model), pytest.raises(error, match=message):
        model.add_weighted_adapter(arguments[0], arguments[1], "new", *arguments[2:])
    assert set(model.peft_config) == {"a", "b"}


# --- models ---------------------------------------------------------------------------------------------------------


def two(build: Callable[[], nn.Module], other: dict[str, Any] | None = None, **options: Any) -> PeftModel:
    """Two adapters with entries that overlap in part."""
    options = {"modules_to_save": [], **options}
    model = adapted(build(), "a", **options)
    model.add_adapter("b", config(**{**options, "importance": "random", **(other or {})}))
    fill(model, "b", seed=2)
    return model.eval()


def add(model: PeftModel, how: str = "linear", name: str = "new", **options: Any) -> None:
    model.add_weighted_adapter(["a", "b"], WEIGHTS, name, how, density_for(how), **options)


@pytest.mark.parametrize("build", [tiny_mlp, tiny_conv, tiny_gpt2])
@pytest.mark.parametrize("how", DETERMINISTIC)
def test_a_combined_adapter_is_what_peft_makes_of_the_dense_changes(build: Any, how: str) -> None:
    model = two(build)
    add(model, how)
    for path, layer in layers_of(model).items():
        own = [layer.fps_values[name].numel() for name in ("a", "b")]
        assert own[0] == own[1]
        dense = [dense_change(layer, name) for name in ("a", "b")]
        torch.testing.assert_close(
            dense_change(layer, "new"), by_peft(dense, WEIGHTS, how, own[0] // 2), rtol=1e-5, atol=1e-6, msg=path
        )
        assert selected_columns(layer, "new") == [
            sorted({*a, *b}) for a, b in zip(selected_columns(layer, "a"), selected_columns(layer, "b"), strict=True)
        ]
        if "a" in layer.fps_bias:
            biases = [layer.fps_bias[name].detach() for name in ("a", "b")]
            expected = by_peft(biases, WEIGHTS, how, biases[0].numel() // 2)
            torch.testing.assert_close(layer.fps_bias["new"].detach(), expected)


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_random_drops_are_drawn_anew_and_from_the_seed(how: str) -> None:
    model = two(tiny_mlp)
    for name, seed in (("once", 0), ("again", 0), ("other", 1)):
        torch.manual_seed(seed)
        add(model, how, name)
    layer = layers_of(model)["first"]
    assert torch.equal(layer.fps_values["once"], layer.fps_values["again"])
    assert not torch.equal(layer.fps_values["once"], layer.fps_values["other"])


@pytest.mark.parametrize(
    ("build", "inputs"),
    [(tiny_mlp, lambda: normal(3, 10)), (tiny_conv, lambda: normal(2, 3, 8, 8)), (tiny_gpt2, lambda: tokens(2))],
    ids=["linear", "conv2d", "conv1d"],
)
def test_the_linear_combination_computes_with_the_weighted_sum(build: Any, inputs: Any) -> None:
    model = two(build)
    add(model)
    plain = dense_reference(build(), model, dict(zip("ab", WEIGHTS, strict=True)))
    model.set_adapter("new")
    torch.testing.assert_close(output(model, inputs()), output(plain, inputs()), rtol=1e-4, atol=1e-5)


def test_adapters_that_differ_in_modules_granularity_and_biases() -> None:
    model = two(
        tiny_vit,
        {"target_modules": ["fc1", "q_proj"], "granularity": "model", "per_neuron": 1.5, "bias": "with_norms"},
        target_modules=["q_proj", "v_proj"],
        bias="none",
    )
    add(model)
    changed = {path for path, layer in layers_of(model).items() if "new" in layer.fps_state}
    assert changed == set(layers_of(model))
    for path, layer in layers_of(model).items():
        if isinstance(layer, EntryLayer):
            held = [name for name in "ab" if name in layer.fps_values]
            expected = sum(dict(zip("ab", WEIGHTS, strict=True))[name] * dense_change(layer, name) for name in held)
            torch.testing.assert_close(dense_change(layer, "new"), expected, rtol=1e-5, atol=1e-7)
        bias = WEIGHTS[1] * layer.fps_bias["b"] if "b" in layer.fps_bias else torch.zeros(layer.neurons)
        torch.testing.assert_close(layer.fps_bias["new"].detach(), bias.detach(), msg=path)


def test_changes_count_with_their_scales_and_the_new_scale_is_one() -> None:
    model = two(tiny_mlp)
    model.set_scale("b", -2)
    add(model)
    for layer in layers_of(model).values():
        expected = WEIGHTS[0] * dense_change(layer, "a") - 2 * WEIGHTS[1] * dense_change(layer, "b")
        torch.testing.assert_close(dense_change(layer, "new"), expected, rtol=1e-5, atol=1e-6)
        assert layer.scaling == {"a": 1, "b": -2, "new": 1}


def test_one_adapter_may_count_twice_and_alone() -> None:
    model = two(tiny_mlp)
    model.add_weighted_adapter(["a", "a"], [1, 2], "twice")
    model.add_weighted_adapter(["a"], [3], "alone")
    layer = layers_of(model)["first"]
    assert torch.equal(dense_change(layer, "twice"), dense_change(layer, "alone"))
    torch.testing.assert_close(dense_change(layer, "alone"), 3 * dense_change(layer, "a"), rtol=1e-6, atol=0)


def test_the_others_and_what_is_active_stay_as_they_are() -> None:
    model, x = two(tiny_mlp), normal(3, 10)
    expected, before = model(x), {name: bits(p) for name, p in model.named_parameters()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    add(model)
    assert model.active_adapters == ["a"]
    assert torch.equal(model(x), expected)
    now = dict(model.named_parameters())
    assert {name: bits(now[name]) for name in before} == before
    assert {name: now[name].requires_grad for name in before} == trainable
    assert not any(p.requires_grad for name, p in now.items() if name not in before)
    assert not model.training


@pytest.mark.parametrize("how", ["linear", "ties", "dare_ties"])
@pytest.mark.parametrize("granularity", ["neuron", "layer", "model"])
def test_a_combined_adapter_is_saved_and_loaded(how: str, granularity: str, tmp_path: Path) -> None:
    model = two(tiny_vit, granularity=granularity, target_modules=["q_proj", "fc1"], layers_to_transform=[1])
    add(model, how)
    model.set_adapter("new")
    expected = model(pixel_values=images()).logits
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "new")
    assert torch.equal(loaded(pixel_values=images()).logits, expected)
    for path, layer in layers_of(model).items():
        assert selected_columns(layers_of(loaded)[path]) == selected_columns(layer, "new")
    loaded.save_pretrained(tmp_path / "again")
    first, again = (tmp_path / name / "adapter_model.safetensors" for name in ("new", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_the_saved_config_tells_what_was_combined_and_how_much_it_trains(tmp_path: Path) -> None:
    model = two(tiny_vit, {"per_neuron": 3})
    add(model, "ties")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    saved = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert saved["record"]["calibration"] == {
        "combination": "ties",
        "adapters": ["a", "b"],
        "weights": WEIGHTS,
        "density": 0.5,
        "majority_sign_method": "total",
    }
    report = model.selection_report("new")
    rows = [
        {*a, *b}
        for layer in layers_of(model).values()
        for a, b in zip(selected_columns(layer, "a"), selected_columns(layer, "b"), strict=True)
    ]
    assert report.entries == sum(map(len, rows))
    assert saved["per_neuron"] is None
    assert report.share <= saved["budget"] <= 1.1 * report.share
    assert {path: sizes["entries"] for path, sizes in saved["record"]["allocation"].items()} == {
        path: layer.fps_values["new"].numel() for path, layer in layers_of(model).items()
    }


def test_a_combined_adapter_of_biases_alone(tmp_path: Path) -> None:
    model = two(tiny_mlp, budget=0)
    add(model)
    for layer in layers_of(model).values():
        expected = WEIGHTS[0] * layer.fps_bias["a"] + WEIGHTS[1] * layer.fps_bias["b"]
        torch.testing.assert_close(layer.fps_bias["new"], expected)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(tiny_mlp(), tmp_path / "new")
    model.set_adapter("new")
    assert torch.equal(loaded(normal(3, 10)), model(normal(3, 10)))


def test_a_combined_adapter_merges_trains_and_is_deleted() -> None:
    model, x = two(tiny_mlp), normal(3, 10)
    add(model)
    model.set_adapter("new")
    expected, before = model(x), base_bytes(model)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert base_bytes(model) == before
    model.train()(x).sum().backward()
    assert all(layer.fps_values["new"].grad.abs().sum() > 0 for layer in layers_of(model).values())
    model.set_adapter("a")
    model.delete_adapter("new")
    add(model)
    assert all("new" in layer.fps_values for layer in layers_of(model).values())


def test_a_half_precision_base_gets_float32_changes() -> None:
    model = get_peft_model(tiny_mlp().to(torch.bfloat16), config(), "a", autocast_adapter_dtype=False)
    fill(model, "a")
    model.add_weighted_adapter(["a"], [0.3], "new")
    layer = layers_of(model)["first"]
    assert layer.fps_values["a"].dtype == torch.bfloat16
    assert layer.fps_values["new"].dtype == layer.fps_bias["new"].dtype == torch.float32
    torch.testing.assert_close(layer.fps_values["new"], 0.3 * layer.fps_values["a"].float())


# --- modules trained whole ------------------------------------------------------------------------------------------


def heads(model: PeftModel, name: str) -> Tensor:
    return model.get_base_model().classifier.modules_to_save[name].weight


def with_heads() -> PeftModel:
    model = two(tiny_vit, modules_to_save=["classifier"])
    for name, seed in (("a", 5), ("b", 6)):
        heads(model, name).data.copy_(normal(5, 32, seed=seed))
    return model


def test_the_only_head_goes_over() -> None:
    model = two(tiny_vit, {"modules_to_save": ["classifier"]})
    heads(model, "b").data.copy_(normal(5, 32, seed=6))
    add(model)
    assert torch.equal(heads(model, "new"), normal(5, 32, seed=6))
    heads(model, "new").data.zero_()
    assert torch.equal(heads(model, "b"), normal(5, 32, seed=6))


@pytest.mark.parametrize(("chosen", "seed"), [("a", 5), ("b", 6)])
def test_of_several_heads_the_one_that_is_asked_for(chosen: str, seed: int, tmp_path: Path) -> None:
    model = with_heads()
    add(model, modules_to_save_from=chosen)
    assert torch.equal(heads(model, "new"), normal(5, 32, seed=seed))
    model.set_adapter("new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "new")
    assert torch.equal(loaded(pixel_values=images()).logits, model(pixel_values=images()).logits)


def test_several_heads_without_a_choice_are_refused() -> None:
    model = with_heads()
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"classifier: the adapters \['a', 'b'\] train this module whole.*from='a'"),
    ):
        add(model)
    with unchanged(model), pytest.raises(ValueError, match=r"modules_to_save_from is 'c', expected one of"):
        add(model, modules_to_save_from="c")
    assert set(model.peft_config) == {"a", "b"}


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "first", "fps_values", "", None, 3])
def test_names_that_cannot_be_given_are_refused(name: Any) -> None:
    model = two(tiny_mlp)
    with (
        unchanged(model),
        pytest.raises((TypeError, ValueError), match=r"adapter_name is|adapter named 'a'|adapter's na"),
    ):
        add(model, name=name)
    assert set(model.peft_config) == {"a", "b"}


def test_unknown_adapters_are_refused() -> None:
    model = two(tiny_mlp)
    with unchanged(model), pytest.raises(ValueError, match=r"adapters \['c'\], expected names among \['a', 'b'\]"):
        model.add_weighted_adapter(["a", "c"], [1, 1], "new")


def test_a_merged_model_is_refused() -> None:
    model = two(tiny_mlp)
    layers_of(model)["last"].merge(adapter_names=["b"])
    with unchanged(model), pytest.raises(ValueError, match=r"last: found merged adapters \['b'\], expected none"):
        add(model)


def test_damaged_adapters_are_refused() -> None:
    model = two(tiny_mlp)
    layers_of(model)["last"].fps_values["b"].data[0] = torch.nan
    with unchanged(model), pytest.raises(ValueError, match="last: adapter 'b': fps_values contains NaN"):
        add(model)


def test_sums_that_overflow_are_refused() -> None:
    model = two(tiny_mlp)
    with unchanged(model), pytest.raises(ValueError, match="first: the combined changes hold NaN or infinity"):
        model.add_weighted_adapter(["a", "b"], [3.4e38, 3.4e38], "new")
