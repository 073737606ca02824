"""What layers keep of their inputs: the right gradients from it, and no more memory than there must be."""

import copy
import gc
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from transformers import activations
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peft_fps.sparse import products
from tests.layers.comparisons import assert_adapter_gradients, assert_equal, trained_gradients
from tests.support.combinations import pairwise
from tests.support.helpers import (
    COPIES,
    adapted,
    dense_change,
    dense_reference,
    entry_places,
    fill,
    layers_of,
    selected_columns,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_vit,
)
from tests.support.helpers import images as image_inputs
from tests.support.helpers import tokens as token_inputs
from tests.support.reading_nets import READERS, TOKENS, WIDTH, inputs, net, saved, saved_storages


EXACT = ("rebuild", "columns")
CHOICES = (*EXACT, "bfloat16")


class Attention(nn.Module):
    """Attention in two heads of a tensor to itself."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads.flip(-1), heads).transpose(1, 2).flatten(2)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer-norm": lambda: nn.LayerNorm(WIDTH),
    "rms-norm": lambda: nn.RMSNorm(WIDTH),
    "llama-norm": lambda: LlamaRMSNorm(WIDTH),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "transformers-gelu": activations.GELUActivation,
    "fast-gelu": activations.FastGELUActivation,
    "new-gelu": activations.NewGELUActivation,
    "quick-gelu": activations.QuickGELUActivation,
    "transformers-gelu-tanh": activations.GELUTanh,
    "transformers-silu": activations.SiLUActivation,
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu-in-place": lambda: nn.ReLU(inplace=True),
    "silu-in-place": lambda: nn.SiLU(inplace=True),
    "attention": Attention,
    "nothing": nn.Identity,
    "norm-activation": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU()),
    "dropout-in-eval": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Dropout(0.5)),
}
MIDDLES = NORMS | ACTIVATIONS | OTHERS
SOME = ["layer-norm", "rms-norm", "llama-norm", "gelu", "relu", "attention"]


def wrapped(
    saved_inputs: str,
    middle: str | Callable[[], nn.Module],
    per_neuron: int = 2,
    then: Callable[[Any], Any] = lambda base: None,
    **options: Any,
) -> Any:
    """Three adapted readers of what `middle` produces; `then` changes the network after it has got the adapter."""
    build = MIDDLES[middle] if isinstance(middle, str) else middle
    model = adapted(net(build, **options), saved_inputs=saved_inputs, target_modules=READERS, per_neuron=per_neuron)
    then(model.base_model.model)
    return model


def replace(**functions: Callable[..., Any]) -> Callable[[nn.Module], None]:
    """Put functions into a network: what it does `between` producer and readers, and `around_reading`."""
    return lambda base: vars(base).update(functions)


Step = Callable[[nn.Module, Tensor], Tensor]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().sum()


def gradients(model: Any, step: Step = loss) -> dict[str, Tensor]:
    """Gradients of the input, of values and bias deltas, and of everything else that is trained."""
    x = inputs(dtype=next(model.parameters()).dtype)
    model.zero_grad()
    step(model, x).backward()
    return ({"input": x.grad} if x.grad is not None else {}) | trained_gradients(model)


def dense_gradients(model: Any, step: Step = loss) -> dict[str, Tensor]:
    """The same by autograd through the dense W + ΔW, without the package's own layers and hooks."""
    base = copy.deepcopy(model).unload()
    for module in base.modules():
        assert not module._forward_hooks or any(h.__module__ == __name__ for h in module._forward_hooks.values())
    plain = dense_reference(base, model, ["default"])
    trained = [name for name, p in model.base_model.model.named_parameters() if p.requires_grad and "fps" not in name]
    for parameter in plain.parameters():
        parameter.requires_grad_()
    x = inputs(dtype=next(model.parameters()).dtype)
    step(plain, x).backward()
    found = {"input": x.grad} if x.grad is not None else {}
    for path, layer in layers_of(model).items():
        module = plain.get_submodule(path)
        found[f"{path}.fps_values.default"] = module.weight.grad[dense_change(layer) != 0]
        if module.bias is not None:
            found[f"{path}.fps_bias.default"] = module.bias.grad
    return found | {name: plain.get_parameter(name).grad for name in trained}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], error: float = 1e-5) -> None:
    """Errors relative to the size of a whole gradient."""
    assert set(found) == set(expected)
    for name, grad in expected.items():
        assert float((found[name].double() - grad.double()).norm()) <= error * float(grad.double().norm()), name


def assert_right(build: Callable[[str], Any], step: Step = loss, error: float = 1e-5) -> None:
    """Every choice gives the gradients of the dense weight, and those that lose nothing give nearly the same ones."""
    models = [build(choice) for choice in EXACT]
    exact = [gradients(model, step) for model in models]
    reference = dense_gradients(models[-1], step)
    for one in exact:
        assert_close(one, reference, error)
        assert_close(one, exact[0], 1e-6)
    assert_close(gradients(build("bfloat16"), step), reference, max(error, 0.01))


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_neuron", [1, 7])
@pytest.mark.parametrize("middle", list(MIDDLES))
def test_gradients_are_those_of_a_dense_weight(middle: str, per_neuron: int):
    assert_right(lambda choice: wrapped(choice, middle, per_neuron))


@pytest.mark.parametrize(("middle", "per_neuron", "kernel"), pairwise(MIDDLES, [1, 7], ["0", "1"]))
def test_what_is_rebuilt_is_the_same_bit_for_bit(
    middle: str, per_neuron: int, kernel: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PEFT_FPS_CPU_KERNEL", kernel)
    monkeypatch.setattr(products, "entries_are_few", lambda structure: True)
    expected = gradients(wrapped("columns", middle, per_neuron))
    assert_equal(gradients(wrapped("rebuild", middle, per_neuron)), expected)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's remark on its rms_norm
@pytest.mark.parametrize(
    ("middle", "kernel"), [(middle, "1") for middle in MIDDLES] + [(middle, "0") for middle in [*SOME, "nothing"]]
)
def test_gradients_under_autocast(middle: str, kernel: str, monkeypatch: pytest.MonkeyPatch):
    def step(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            result = model(x)
        return result.float().square().sum()

    monkeypatch.setenv("PEFT_FPS_CPU_KERNEL", kernel)
    exact = [gradients(wrapped(choice, middle), step) for choice in CHOICES]
    reference = dense_gradients(wrapped("columns", middle))
    for one in exact:
        assert_close(one, exact[0], 0 if kernel == "1" else 0.02)
        assert_close(one, reference, 0.05)


@pytest.mark.parametrize("middle", SOME)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_in_other_dtypes(middle: str, dtype: torch.dtype):
    def build(choice: str) -> Any:
        return adapted(net(MIDDLES[middle]).to(dtype), saved_inputs=choice, target_modules=READERS)

    reference = dense_gradients(build("columns").float())
    for choice in CHOICES:
        # llama's norm computes in float32 whatever it gets
        exact = dtype == torch.float64 and choice != "bfloat16" and middle != "llama-norm"
        assert_close(gradients(build(choice)), reference, 1e-5 if exact else 0.05)


@pytest.mark.parametrize(
    ("middle", "part", "reentrant"), pairwise([*SOME, "nothing", "silu-in-place"], ["all", "readers"], [False, True])
)
def test_gradient_checkpointing_changes_nothing(middle: str, part: str, reentrant: bool):
    again = partial(checkpoint, use_reentrant=reentrant)

    def step(model: nn.Module, x: Tensor) -> Tensor:
        return (again(model, x) if part == "all" else model(x)).square().sum()

    def build(choice: str) -> Any:
        return wrapped(choice, middle, then=replace(around_reading=again) if part == "readers" else lambda base: None)

    assert_right(build, step)
    for choice in EXACT:
        assert_equal(gradients(build(choice), step), gradients(wrapped(choice, middle)))


@pytest.mark.parametrize("middle", SOME)
def test_two_micro_batches_before_one_backward(middle: str):
    def step(model: nn.Module, x: Tensor) -> Tensor:
        return loss(model, x) + loss(model, x.detach() * 0.5 + 1) + loss(model, x.flip(0))

    assert_right(lambda choice: wrapped(choice, middle), step)


@pytest.mark.parametrize("middle", SOME)
@pytest.mark.parametrize("choice", CHOICES)
def test_two_backwards_through_one_graph(middle: str, choice: str):
    model = wrapped(choice, middle)
    once, x = gradients(model), inputs()
    model.zero_grad()
    kept = loss(model, x)
    kept.backward(retain_graph=True)
    kept.backward()
    assert_equal({"input": x.grad} | trained_gradients(model), {name: 2 * grad for name, grad in once.items()})
    with pytest.raises(RuntimeError, match="second time"):
        kept.backward()


@pytest.mark.parametrize("middle", SOME)
@pytest.mark.parametrize("choice", CHOICES)
def test_backwards_in_another_order_than_forwards(middle: str, choice: str):
    model, batches = wrapped(choice, middle), [inputs(seed) for seed in range(3)]
    expected = [torch.autograd.grad(loss(model, x), x)[0] for x in batches]
    losses = [loss(model, x) for x in batches]
    for place in (1, 2, 0):
        assert torch.equal(torch.autograd.grad(losses[place], batches[place])[0], expected[place])


@pytest.mark.parametrize("middle", list(NORMS))
def test_norms_that_are_trained_themselves(middle: str):
    def build(choice: str) -> Any:
        return wrapped(choice, middle, then=lambda base: base.middle.requires_grad_())

    assert "middle.weight" in gradients(build("rebuild"))
    assert_right(build)


@pytest.mark.parametrize("middle", ["layer-norm", "gelu"])
def test_inputs_without_a_gradient(middle: str):
    def build(choice: str) -> Any:
        return wrapped(choice, middle, then=lambda base: base.before.requires_grad_(False))

    assert_right(build, lambda model, x: loss(model, x.detach()))


@pytest.mark.parametrize(
    "layout",
    [lambda y: y.transpose(0, 1), lambda y: y[:, 1:4], lambda y: y[:1].expand(3, -1, -1), lambda y: y.clone()]
    + [lambda y: y.flip(-1), lambda y: y.view(-1, WIDTH), lambda y: y.transpose(1, 2).clone().transpose(1, 2)],
    ids=["transpose", "slice", "expand", "clone", "flip", "view", "strided"],
)
@pytest.mark.parametrize("middle", SOME)
def test_readers_of_a_view(middle: str, layout: Callable[[Tensor], Tensor]):
    assert_right(lambda choice: wrapped(choice, middle, then=replace(between=lambda source, y: layout(y))))


def test_values_of_one_adapter_with_another_choice():
    for first, second in (("columns", "rebuild"), ("rebuild", "columns")):
        model = wrapped(first, "layer-norm")
        model.add_adapter("other", copy.copy(model.peft_config["default"]))
        model.peft_config["other"].saved_inputs = second
        fill(model, "other", seed=3)
        for name in ("default", "other"):
            model.set_adapter(name)
            loss(model, inputs()).backward()
            plain = dense_reference(copy.deepcopy(model).unload(), model, [name]).requires_grad_()
            loss(plain, inputs()).backward()
            assert_adapter_gradients(model, plain, name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "choice", "reentrant"),
    pairwise([tiny_vit, tiny_bert, tiny_gpt2, tiny_llama], CHOICES, [None, False, True]),
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*use_cache=True. is incompatible with gradient checkpointing")
def test_whole_models(build: Callable[[], Any], choice: str, reentrant: bool | None):
    model = adapted(build(), saved_inputs=choice, modules_to_save=[], per_neuron=4)
    x = image_inputs() if build is tiny_vit else token_inputs()
    if reentrant is not None:
        if reentrant:
            model.base_model.model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for module in model.modules():
        module.training = True  # checkpointing is for training only
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_pdrop", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model(x).logits.square().sum().backward()
    plain = dense_reference(build(), model, ["default"]).requires_grad_()
    plain(x).logits.square().sum().backward()
    for path, layer in layers_of(model).items():
        module, found = plain.get_submodule(path), layer.fps_values["default"].grad
        expected = module.weight.grad.reshape(-1)[entry_places(module, selected_columns(layer))]
        error = 0.02 if choice == "bfloat16" else 1e-4
        assert float((found - expected).norm()) <= error * float(expected.norm()) + 1e-6, path


# --- what must not be rebuilt ---------------------------------------------------------------------------------------


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output + 1


def change_output(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(3)


def replace_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * 2 + 1,)


def hook(kind: str, function: Callable[..., Any], **options: Any) -> Callable[[nn.Module], None]:
    def register(model: nn.Module) -> None:
        getattr(model.get_submodule("middle"), f"register_{kind}hook")(function, **options)

    return register


HOOKS = {
    "output": hook("forward_", double_output),
    "output-first": hook("forward_", double_output, prepend=True),
    "output-in-place": hook("forward_", change_output),
    "input": hook("forward_pre_", replace_input),
}


@pytest.mark.parametrize(
    ("middle", "kind", "when"),
    pairwise(["layer-norm", "rms-norm", "llama-norm", "transformers-gelu", "silu"], HOOKS, ["before", "after"]),
)
def test_hooks_of_the_producer(middle: str, kind: str, when: str):
    moment = {"before": "outside", "after": "then"}[when]  # before and after there is an adapter
    assert_right(lambda choice: wrapped(choice, middle, 7, **{moment: HOOKS[kind]}))


def test_hooks_of_all_modules():
    def only_norms(module: nn.Module, args: Any, output: Any) -> Any:
        return 2 * output + 1 if isinstance(module, nn.LayerNorm) else None

    handle = register_module_forward_hook(only_norms)
    try:
        assert_right(lambda choice: wrapped(choice, "layer-norm", 7))
    finally:
        handle.remove()


def test_a_forward_put_over_the_producers_own():
    def put_over(base: Any) -> None:
        norm = base.middle
        norm.forward = lambda x: 2 * F.layer_norm(x, (WIDTH,), norm.weight, norm.bias)

    found, expected = (gradients(wrapped(choice, "layer-norm", 7, put_over)) for choice in EXACT)
    assert_equal(found, expected)


class Gated(nn.GELU):
    """An activation that is not computed element by element."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * input.flip(-1)


class Softened(nn.LayerNorm):
    """A norm with an argument of its own."""

    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(input).softmax(-1)


class NoisyRMSNorm(nn.Module):
    """A norm that gives another result every time."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.rms_norm(x, x.shape[-1:]), 0.5)


def test_norms_that_are_random():
    def step(model: nn.Module, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return loss(model, x)

    assert_right(lambda choice: wrapped(choice, NoisyRMSNorm, 7), step)


class Calls(nn.Module):
    """A norm that is called with more than a tensor."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.call = Softened(WIDTH), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.norm, x)


@pytest.mark.parametrize(
    "middle",
    [
        Gated,
        lambda: Softened(WIDTH),
        lambda: Calls(lambda norm, x: norm(input=x)),
        lambda: Calls(lambda norm, x: norm(x, 3.0)),
        lambda: Calls(lambda norm, x: norm(x, scale=3.0)),
    ],
    ids=["activation", "norm", "by-name", "by-position", "by-keyword"],
)
def test_subclasses_of_producers_however_they_are_called(middle: Callable[[], nn.Module]):
    assert_right(lambda choice: wrapped(choice, middle, 7))


@pytest.mark.parametrize("middle", ["layer-norm", "llama-norm", "gelu"])
def test_parameters_that_are_put_in_for_one_call(middle: str):
    def step(model: nn.Module, x: Tensor) -> Tensor:
        other = {name: 2 * p.detach() + 1 for name, p in model.named_parameters() if "middle" in name}
        return torch.func.functional_call(model, other, (x,)).square().sum()

    assert_right(lambda choice: wrapped(choice, middle, 7), step)


# --- changes in place -----------------------------------------------------------------------------------------------


def change_y(source: Tensor, y: Tensor) -> Tensor:
    return y.mul_(2)


def change_source(source: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        source.copy_(source.flip(-1))  # norms do not notice another scale
    return y


@pytest.mark.parametrize(
    ("middle", "change", "dtype"),
    pairwise([*SOME, "nothing"], [change_y, change_source], [torch.float32, torch.bfloat16]),
)
def test_a_change_before_the_product_is_no_silent_mistake(
    middle: str, change: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
):
    """The readers' gradients are right, or refused, if what their input was made from is changed before them."""

    def build(choice: str) -> Any:
        return wrapped(choice, middle, 7, replace(between=change)).to(dtype)

    assert_right_or_refused(build, build, 1e-5 if dtype == torch.float32 else 0.03)


AFTER = [(middle, place) for middle in [*SOME, "nothing"] for place in ("source", "y")]
AFTER += [(middle, "weight") for middle in NORMS]


@pytest.mark.parametrize(("middle", "place"), AFTER)
def test_a_change_after_the_product_is_no_silent_mistake(middle: str, place: str):
    def build(choice: str) -> Any:
        places: dict[str, Tensor] = {}

        def between(source: Tensor, y: Tensor) -> Tensor:
            places.update(source=source, y=y)
            return y

        def around(function: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
            result = function(y)
            with torch.no_grad():
                places[place].copy_(places[place].flip(-1))
            return result

        model = wrapped(choice, middle, 7, replace(between=between, around_reading=around))
        places["weight"] = getattr(model.base_model.model.middle, "weight", None)
        return model

    assert_right_or_refused(build, lambda choice: wrapped(choice, middle, 7), 1e-5)


def assert_right_or_refused(build: Callable[[str], Any], same: Callable[[str], Any], error: float) -> None:
    """Gradients of the values alone, or of all, are those of W + ΔW in float64, unless autograd refuses them."""
    plain_model = same("columns")
    plain = dense_reference(copy.deepcopy(plain_model).unload(), plain_model, ["default"]).requires_grad_(False)
    weights = [plain.get_submodule(path).weight.requires_grad_() for path in READERS]
    expected = torch.autograd.grad(loss(plain, inputs(dtype=weights[0].dtype)), weights)
    at_entries = [
        whole[dense_change(layers_of(plain_model)[path]) != 0].double()
        for path, whole in zip(READERS, expected, strict=True)
    ]
    for choice in CHOICES:
        for of in ("values", "all"):
            found = gradients_unless_refused(build(choice), of)
            for path, grad, right in zip(READERS, found or (), at_entries, strict=False):
                allowed = error if choice != "bfloat16" else 0.03
                assert float((grad.double() - right).norm()) <= allowed * float(right.norm()), (path, choice, of)


def gradients_unless_refused(model: Any, of: str) -> tuple[Tensor, ...] | None:
    values = {name: p for name, p in model.base_model.model.named_parameters() if "fps_values" in name}
    x = inputs(dtype=next(model.parameters()).dtype)
    try:
        result = loss(model, x)
        return torch.autograd.grad(result, [*values.values(), *([x] if of == "all" else [])])
    except RuntimeError as refusal:
        assert "modified by an inplace operation" in str(refusal)  # noqa: PT017
        return None


# --- what is saved --------------------------------------------------------------------------------------------------


def frozen(middle: str | Callable[[], nn.Module], **options: Any) -> nn.Module:
    return net(MIDDLES[middle] if isinstance(middle, str) else middle, **options).requires_grad_(False)


def unions(model: Any) -> list[set[int]]:
    return [{column for row in selected_columns(layer) for column in row} for layer in layers_of(model).values()]


def copied(model: Any, bytes_each: int = 4) -> int:
    return TOKENS[0] * TOKENS[1] * len(set().union(*unions(model))) * bytes_each


@pytest.mark.parametrize(
    ("choice", "middle", "per_neuron"),
    [("rebuild", middle, per_neuron) for middle in [*NORMS, *ACTIVATIONS] for per_neuron in (1, 7)]
    + [(choice, middle, 2) for middle in ("relu", "attention") for choice in CHOICES],
)
def test_inputs_that_are_rebuilt_or_kept_anyway_cost_no_memory(choice: str, middle: str, per_neuron: int):
    assert saved(wrapped(choice, middle, per_neuron)) == saved(frozen(middle))


@pytest.mark.parametrize(
    ("middle", "per_neuron", "choice"),
    pairwise([*NORMS, *ACTIVATIONS, "nothing", "silu-in-place"], [1, 3], ["columns", "bfloat16"]),
)
def test_copied_columns_are_kept_once_for_all_readers(middle: str, per_neuron: int, choice: str):
    model = wrapped(choice, middle, per_neuron)
    joint = set().union(*unions(model))
    assert len(joint) < WIDTH
    assert len(joint) < sum(map(len, unions(model)))  # some are needed twice
    assert saved(model) - saved(frozen(middle)) == copied(model, 2 if choice == "bfloat16" else 4)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("middle", ["relu", "attention", "layer-norm", "nothing"])
def test_another_layout_costs_no_more_than_the_columns(choice: str, middle: str):
    turn = replace(between=lambda source, y: y.transpose(0, 1))
    model, plain = wrapped(choice, middle, 1, turn), frozen(middle)
    turn(plain)
    assert saved(model) - saved(plain) <= copied(model)


@pytest.mark.parametrize("middle", ["gelu", "relu", "attention"])
@pytest.mark.parametrize("choice", CHOICES)
def test_under_autocast_no_more_than_the_columns_in_half_precision(choice: str, middle: str):
    model = wrapped(choice, middle, 1)
    context = partial(torch.autocast, "cpu", torch.bfloat16)
    assert saved(model, context) - saved(frozen(middle), context) <= copied(model, 2)


@pytest.mark.parametrize("middle", list(NORMS))
def test_rebuilding_costs_no_more_than_columns_in_half_precision(middle: str):
    model, plain = (each.to(torch.bfloat16) for each in (wrapped("rebuild", middle, 1), frozen(middle)))
    assert saved(model, dtype=torch.bfloat16) - saved(plain, dtype=torch.bfloat16) <= copied(model, 2)


@pytest.mark.parametrize(("middle", "choice", "per_neuron"), pairwise(SOME, CHOICES, [1, 7]))
def test_nothing_as_large_as_a_weight_is_saved(choice: str, middle: str, per_neuron: int):
    neurons = 200  # more weights than there are numbers in any activation
    model = wrapped(choice, middle, per_neuron, neurons=neurons)
    with saved_storages(model) as found:
        model(inputs())
    assert max(found.values()) < 4 * neurons * WIDTH


CHECKPOINTED = replace(around_reading=partial(checkpoint, use_reentrant=False))


def test_checkpointed_parts_keep_nothing_more():
    for middle in SOME:
        plain = frozen(middle)
        CHECKPOINTED(plain)
        for choice in CHOICES:
            assert saved(wrapped(choice, middle, 1, CHECKPOINTED)) == saved(plain)


ONE_TENSOR = 4 * TOKENS[0] * TOKENS[1] * WIDTH
ONE_NOTE = 2 * ONE_TENSOR  # on the tensor that was read last: what it was made from, and copied columns


def strided_tensors() -> list[Tensor]:
    found = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    return [t for t in found if t.layout == torch.strided and t.device.type == "cpu" and t.data_ptr()]


def new_bytes(result: Callable[[], Any]) -> int:
    """Bytes of what Python still holds of all that a call has made, the result among it."""
    gc.collect()
    before = strided_tensors()
    known = {tensor.untyped_storage().data_ptr() for tensor in before}
    result = result()
    gc.collect()
    storages = [tensor.untyped_storage() for tensor in strided_tensors()]
    found = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in known}
    del result, before
    return sum(found.values())


@pytest.mark.parametrize("middle", ["layer-norm", "nothing"])
@pytest.mark.parametrize("choice", CHOICES)
def test_checkpointed_parts_leave_the_latest_notes_at_most(choice: str, middle: str):
    model, plain, x = wrapped(choice, middle), frozen(middle), inputs()
    loss(model, x).backward()  # index tensors are derived once, gradients are there
    for one in (model.base_model.model, plain):
        CHECKPOINTED(one)
    assert new_bytes(lambda: model(x)) <= new_bytes(lambda: plain(x)) + ONE_NOTE


def hidden_states(model: Any) -> list[Tensor]:
    """What the readers will have read, forward by forward, as where a model returns its hidden states."""
    states: list[Tensor] = []
    model.base_model.model.between = lambda source, y: (states.append(y), y)[1]
    return states


@pytest.mark.parametrize("middle", ["layer-norm", "nothing"])
@pytest.mark.parametrize("choice", CHOICES)
def test_one_note_at_most_outlives_backward(choice: str, middle: str):
    model, x = wrapped(choice, middle), inputs()
    loss(model, x).backward()
    states = hidden_states(model)

    def steps() -> list[Tensor]:
        for _ in range(4):
            loss(model, x).backward()
        return states

    assert new_bytes(steps) <= 4 * ONE_TENSOR + ONE_NOTE


# --- the notes themselves -------------------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> list[str]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [name for name, module in model.named_modules() if any(getattr(module, kind) for kind in kinds)]


@pytest.mark.parametrize(
    ("choice", "middle", "way"),
    pairwise(CHOICES, ["layer-norm", "llama-norm", "norm-activation"], ["unload", "merge_and_unload"]),
)
def test_no_hooks_are_left(choice: str, way: str, middle: str):
    model = wrapped(choice, middle)
    loss(model, inputs()).backward()
    assert hooks_of(getattr(model, way)()) == []


@pytest.mark.parametrize("way", ["unload", "merge_and_unload"])
def test_hooks_of_others_are_left(way: str):
    model = wrapped("rebuild", "layer-norm", outside=HOOKS["output"])
    base = getattr(model, way)()
    assert list(base.middle._forward_hooks.values()) == [double_output]


def test_one_hook_for_several_adapters():
    model = wrapped("rebuild", "layer-norm")
    model.add_adapter("other", copy.copy(model.peft_config["default"]))
    assert len(model.base_model.model.middle._forward_hooks) == 1


@pytest.mark.parametrize(("choice", "way", "build"), pairwise(CHOICES, COPIES, [tiny_bert, tiny_llama]))
def test_copies_train_alike(build: Callable[[], Any], choice: str, way: str):
    def trained(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        model(token_inputs()).logits.square().sum().backward()
        return trained_gradients(model)

    model = adapted(build(), saved_inputs=choice, modules_to_save=[])
    expected = trained(model)
    twin = COPIES[way](model)
    assert_equal(trained(twin), expected)
    assert [len(m._forward_hooks) for m in twin.modules()] == [len(m._forward_hooks) for m in model.modules()]
    assert hooks_of(twin.unload()) == []


@pytest.mark.parametrize("choice", CHOICES)
def test_outputs_are_saved_as_plain_tensors(choice: str):
    """What a user does with hidden states that come out of a model."""
    model = wrapped(choice, "layer-norm")
    states = hidden_states(model)
    model(inputs())
    stream, plain = io.BytesIO(), io.BytesIO()
    torch.save(states[0], stream)
    assert torch.equal(torch.load(io.BytesIO(stream.getvalue()), weights_only=True), states[0])
    torch.save(states[0].detach().clone().requires_grad_(), plain)
    assert stream.tell() <= plain.tell() + 200


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("middle", SOME)
def test_evaluation_notes_nothing(choice: str, middle: str):
    model = wrapped(choice, middle)
    states = hidden_states(model)
    with torch.no_grad():
        expected = model(inputs())
    with torch.inference_mode():
        assert torch.equal(model(inputs()), expected)
    assert [vars(y) for y in states] == [{}, {}]


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(loss(model, x), x, create_graph=True)
    return slope.square().sum()


@pytest.mark.parametrize("choice", ["rebuild", "columns"])
def test_a_penalty_on_the_gradient_of_inputs(choice: str):
    model = wrapped(choice, "layer-norm")
    torch.testing.assert_close(gradients(model, penalty), dense_gradients(model, penalty), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_second_derivative_of_the_values_is_refused(choice: str):
    model = wrapped(choice, "layer-norm")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first = torch.autograd.grad(loss(model, inputs()), trained, create_graph=True)
    with pytest.raises(ValueError, match="fps_values is differentiated again"):
        sum(gradient.sum() for gradient in first).backward()
