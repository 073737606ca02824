import pytest
import torch
from peft import LoraConfig, ShiraConfig
from peft.tuners.supertuning import SupertuningConfig
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_fps import FPSConfig
from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.attached_model import attach
from peft_fps.benchmarks.transfer.method_configs import linear_layers


WIDTH, HIDDEN, LAYERS, CLASSES = 64, 96, 2, 5
LINEAR = {
    **{f"attention.{part}": (WIDTH, WIDTH) for part in "qkvo"},
    **{"mlp.up": (HIDDEN, WIDTH), "mlp.down": (WIDTH, HIDDEN)},
}
RANK_ONE = {
    "all": LAYERS * sum(n + m for n, m in LINEAR.values()),
    "queries, keys and values": LAYERS * 3 * 2 * WIDTH,
    "queries and values": LAYERS * 2 * 2 * WIDTH,
}
BUDGETED = [name for name, arm in ARMS.items() if arm.budgeted and arm.build]
TRAINED_AS_DEFAULT = {"fps-default", "fps-default-one-rate", "magnitude-default"}
WITH_BIASES = (
    {"try-low-rates", "try-centred"} | TRAINED_AS_DEFAULT | {name for name in ARMS if name.endswith("-biases")}
)


def vit() -> ViTForImageClassification:
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=CLASSES, **sizes))


BACKBONE = sum(parameter.numel() for name, parameter in vit().named_parameters() if "classifier" not in name)
HEAD = CLASSES * WIDTH + CLASSES


def trained_of(method: str, share: float | None, seed: int = 0) -> dict[str, nn.Parameter]:
    model = attach(ARMS[method], vit(), share, seed)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("share", [0.03, 0.1])
@pytest.mark.parametrize("method", BUDGETED)
def test_a_budget_is_never_exceeded_and_the_head_is_trained_besides(method, share):
    trained = trained_of(method, share)
    head = {name for name in trained if "classifier" in name}
    assert sum(trained[name].numel() for name in head) == HEAD
    sparse = sum(trained[name].numel() for name in trained if name not in head)
    assert sparse <= share * BACKBONE
    if method not in ("lora", "shira", "tr-pts"):  # the last spends by block, the others whole ranks
        assert sparse > share * BACKBONE - len(LINEAR) * LAYERS - 1


@pytest.mark.parametrize("method", ["lora", "shira"])
@pytest.mark.parametrize("spent", RANK_ONE)
def test_rank_one_goes_to_as_many_layers_as_the_budget_allows(method, spent):
    share = RANK_ONE[spent] / BACKBONE
    trained = trained_of(method, share * 1.0001)
    assert sum(p.numel() for name, p in trained.items() if "classifier" not in name) == RANK_ONE[spent]


@pytest.mark.parametrize("method", ["lora", "shira"])
def test_a_budget_too_small_for_rank_one_is_refused(method):
    share = RANK_ONE["queries and values"] / BACKBONE * 0.999
    with pytest.raises(ValueError, match="A rank of 1 on queries and values trains more than the budget") as caught:
        trained_of(method, share)
    assert str(share) in str(caught.value)
    assert "expected a larger budget" in str(caught.value)


def test_lora_beside_fps_has_rank_one_on_queries_and_values_and_leaves_the_rest_of_the_budget():
    trained = trained_of("fps-biases-lora", 0.1)
    low = {name: parameter.numel() for name, parameter in trained.items() if "lora_" in name}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in low} == {"q_proj", "v_proj"}
    assert sum(low.values()) == RANK_ONE["queries and values"]
    with pytest.raises(ValueError, match="all of the budget .* expected a larger budget"):
        trained_of("fps-biases-lora", RANK_ONE["queries and values"] / BACKBONE)


def test_methods_without_a_choice():
    norms = LAYERS * 2 + 1
    biases = WIDTH + LAYERS * sum(n for n, _ in LINEAR.values()) + norms * WIDTH - LAYERS * WIDTH  # no keys
    assert sum(p.numel() for p in trained_of("bitfit", None).values()) == biases + HEAD
    assert {name for name, arm in ARMS.items() if not arm.budgeted} == {"linear", "full", "bitfit"}
    assert ARMS["linear"].build is None
    assert ARMS["full"].build is None


@pytest.mark.parametrize("method", BUDGETED)
def test_configs_are_of_the_method_and_carry_seed_and_share(method):
    base = vit()
    config = ARMS[method].build(base, 0.1, 7)
    others = {"lora": LoraConfig, "shira": ShiraConfig, "supertuning": SupertuningConfig}
    assert type(config) is others.get(method, FPSConfig)
    if isinstance(config, FPSConfig):
        assert (config.per_neuron, config.seed) == (None, 7)
    if isinstance(config, FPSConfig):
        spent = RANK_ONE["queries and values"] if ARMS[method].beside else 0
        assert config.budget == pytest.approx(0.1 - spent / BACKBONE)
        assert config.bias == ("all" if method in {*WITH_BIASES, "fps-biases-lora"} else "none")
    if isinstance(config, ShiraConfig):
        assert config.random_seed == 7


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fps", {"importance": "activation", "norm": "l1", "weight_magnitude": True, "granularity": "neuron"}),
        ("fps-l2", {"norm": "l2", "weight_magnitude": True, "granularity": "neuron"}),
        ("fps-l2-layer", {"norm": "l2", "weight_magnitude": True, "granularity": "layer"}),
        ("fps-l2-unweighted", {"norm": "l2", "weight_magnitude": False, "granularity": "neuron"}),
        ("gps", {"importance": "gradient", "loss": "contrastive", "granularity": "neuron"}),
        ("gps-biases", {"importance": "gradient", "loss": "contrastive", "bias": "all"}),
        ("magnitude-biases", {"importance": "magnitude", "bias": "all"}),
        ("random-biases", {"importance": "random", "bias": "all"}),
        ("gps-task", {"importance": "gradient", "loss": "task"}),
        ("fish-mask", {"importance": "fisher", "granularity": "model", "fisher": "example"}),
        ("tr-pts", {"importance": "fisher", "granularity": "block", "block_top": 0.03}),
        ("keep-0.7-biases", {"token_keep_rate": 0.7, "token_blocks": None, "bias": "all"}),
        ("keep-0.5-fixed-biases", {"token_keep_rate": 0.5, "token_blocks": [0, 1], "bias": "all"}),
        ("gate-biases", {"token_gate": "threshold", "importance": "activation", "bias": "all"}),
        ("magnitude-layer", {"importance": "magnitude", "granularity": "layer"}),
        ("fps-32-images", {"importance": "activation", "granularity": "neuron"}),
    ],
)
def test_what_the_names_say(method, options):
    config = ARMS[method].build(vit(), 0.1, 0)
    assert {name: getattr(config, name) for name in options} == options


def test_variants_are_methods_with_something_changed():
    assert all(arm.is_variant for arm in ARMS.values() if arm.tuned_as)
    tuned_alone = {name for name, arm in ARMS.items() if arm.is_variant and not arm.tuned_as}
    assert tuned_alone == {"fps-default-one-rate", "fps-input-rates", "fps-model", "gps-task-biases", "try-low-rates"}


def test_variants_are_tuned_as_methods_that_tune_themselves():
    for name, arm in ARMS.items():
        if arm.tuned_as:
            tuner = ARMS[arm.tuned_as]
            assert tuner.tuned_as is None, name
            assert (tuner.budgeted, tuner.learning_rates) == (arm.budgeted, arm.learning_rates), name
        assert len(arm.learning_rates) == {"linear": 0, "try-low-rates": 1, "fps-default-one-rate": 1}.get(name, 3), (
            name
        )
        assert list(arm.learning_rates) == sorted(set(arm.learning_rates)), name
    labels = [arm.label for arm in ARMS.values()]
    assert len(set(labels)) == len(labels)


def test_retired_methods_cannot_be_built_and_all_others_with_a_budget_can():
    retired = {name for name, arm in ARMS.items() if arm.retired}
    assert retired == {name for name, arm in ARMS.items() if arm.build is None} - {"linear", "full"}
    assert "try-centred-layer" in retired


def test_linear_layers_leave_out_the_head_and_the_patches():
    base = vit()
    found = linear_layers(base)
    assert sorted(tuple(layer.weight.shape) for layer in found.values()) == sorted(LAYERS * list(LINEAR.values()))
    assert all(found[name] is base.get_submodule(name) for name in found)
