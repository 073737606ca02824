"""The FPS cases that join the lists PEFT's tests are parametrised with.

They mirror the cases of the other sparse methods (SHiRA, Super-Tuning) and add the layer types those lack. PEFT's
test modules keep their cases in module-level lists, dicts and tuples or directly in the decorator; each of the tables
below serves one of these forms.
"""

from functools import partial
from typing import Any

from peft import TaskType

from peft_fps import FPSConfig


# name, model, config class, config arguments
_CUSTOM_MODELS: list[tuple[str, str, type, dict[str, Any]]] = [
    ("Vanilla MLP 1 FPS", "MLP", FPSConfig, {"target_modules": "lin0", "per_neuron": 2}),
    ("Vanilla MLP 2 FPS", "MLP", FPSConfig, {"target_modules": ["lin0"], "per_neuron": 2}),
    ("Vanilla MLP 3 FPS", "MLP", FPSConfig, {"target_modules": ["lin1"], "per_neuron": 2}),
    ("Vanilla MLP 4 FPS", "MLP", FPSConfig, {"target_modules": ["lin0", "lin1"], "per_neuron": 2}),
    (
        "Vanilla MLP 5 FPS modules_to_save",
        "MLP",
        FPSConfig,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "per_neuron": 2},
    ),
    (
        "Vanilla MLP 6 FPS exclude",
        "MLP",
        FPSConfig,
        {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"], "per_neuron": 1},
    ),
    ("Vanilla MLP 7 FPS regex", "MLP", FPSConfig, {"target_modules": r".*lin\d", "per_neuron": 3}),
    ("Vanilla MLP 8 FPS all entries", "MLP", FPSConfig, {"target_modules": ["lin0"], "per_neuron": 10}),
    ("Vanilla MLP 9 FPS budget", "MLP", FPSConfig, {"target_modules": ["lin0", "lin1"], "budget": 0.3}),
    ("Vanilla MLP 10 FPS no bias", "MLP", FPSConfig, {"target_modules": ["lin0"], "per_neuron": 2, "bias": "none"}),
    ("Vanilla MLP 11 FPS bias only", "MLP", FPSConfig, {"target_modules": ["lin0"], "per_neuron": 0}),
    (
        "Vanilla MLP 12 FPS layer magnitude",
        "MLP",
        FPSConfig,
        {"target_modules": ["lin0"], "per_neuron": 2, "granularity": "layer", "importance": "magnitude"},
    ),
    (
        "Vanilla MLP 13 FPS model random",
        "MLP",
        FPSConfig,
        {"target_modules": ["lin0", "lin1"], "per_neuron": 2, "granularity": "model", "importance": "random"},
    ),
    ("Embedding + transformers Conv1D 1 FPS", "EmbConv1D", FPSConfig, {"target_modules": ["conv1d"], "per_neuron": 2}),
    (
        "Embedding + transformers Conv1D 2 FPS",
        "EmbConv1D",
        FPSConfig,
        {"target_modules": ["conv1d", "lin0"], "per_neuron": 2},
    ),
    ("Conv2d 1 FPS", "Conv2d", FPSConfig, {"target_modules": ["conv2d"], "per_neuron": 3}),
    ("Conv2d 2 FPS", "Conv2d", FPSConfig, {"target_modules": ["conv2d", "lin0"], "per_neuron": 3}),
    (
        "Conv2d 3 FPS modules_to_save",
        "Conv2d",
        FPSConfig,
        {"target_modules": ["conv2d"], "modules_to_save": ["lin0"], "per_neuron": 3},
    ),
    ("Conv2d 4 FPS after linear", "Conv2d2", FPSConfig, {"target_modules": ["lin0", "conv2d"], "per_neuron": 4}),
    ("Conv2d 5 FPS 1x1", "Conv2d1x1", FPSConfig, {"target_modules": ["conv2d"], "per_neuron": 1}),
    ("Conv2d Groups 1 FPS", "Conv2dGroups", FPSConfig, {"target_modules": ["conv2d"], "per_neuron": 3}),
    ("Conv2d Groups 2 FPS", "Conv2dGroups2", FPSConfig, {"target_modules": ["conv2d"], "per_neuron": 3}),
    ("Conv1d FPS", "Conv1d", FPSConfig, {"target_modules": ["conv1d"], "per_neuron": 2}),
    ("Conv1d Groups FPS", "Conv1dGroups", FPSConfig, {"target_modules": ["conv1d"], "per_neuron": 3}),
    ("Conv3d 1 FPS", "Conv3d", FPSConfig, {"target_modules": ["conv3d"], "per_neuron": 3}),
    ("Conv3d 2 FPS", "Conv3d", FPSConfig, {"target_modules": ["conv3d", "lin0"], "per_neuron": 3}),
    ("MHA FPS", "MHA", FPSConfig, {"target_modules": ["lin0"], "per_neuron": 2}),
]

# the default budget of these tests' models is too small for the biases of one layer
_SMALL = partial(FPSConfig, per_neuron=2)

_LIN0: dict[str, Any] = {"target_modules": ["lin0"], "per_neuron": 4, "init_weights": False}
_LIN1: dict[str, Any] = {"target_modules": ["lin1"], "per_neuron": 4, "init_weights": False}

# name, tuner method, config class, first and second config arguments
_MULTIPLE_ADAPTERS = [
    ("FPS Same", "fps", FPSConfig, _LIN0, _LIN0),
    ("FPS Different", "fps", FPSConfig, _LIN0, _LIN1),
]


def _language_model_cases(task_type: str, **overrides: Any) -> list[tuple[type, dict[str, Any]]]:
    """Return the cases of one file of transformers models."""
    # feature extraction passes exclude_modules: the tests read the hidden states, so the pooler gets no gradient
    common = {"task_type": task_type, "target_modules": None, "per_neuron": 2, **overrides}
    return [(FPSConfig, common), (FPSConfig, {**common, "target_modules": "all-linear"})]


# test file -> name of a module-level list -> entries to append
LISTS: dict[str, dict[str, list[Any]]] = {
    "test_config": {"LAYER_INDEXING_CONFIG_CLASSES": [(FPSConfig, {})]},
    "test_custom_models": {
        "TEST_CASES": _CUSTOM_MODELS,
        "ALL_PEFT_CONFIG_CLASSES": [FPSConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": _MULTIPLE_ADAPTERS,
    },
    "test_decoder_models": {"ALL_CONFIGS": _language_model_cases("CAUSAL_LM")},
    "test_encoder_decoder_models": {"ALL_CONFIGS": _language_model_cases("SEQ_2_SEQ_LM")},
    "test_feature_extraction_models": {
        "ALL_CONFIGS": _language_model_cases("FEATURE_EXTRACTION", exclude_modules=["pooler.dense"])
    },
    "test_seq_classifier": {"ALL_CONFIGS": _language_model_cases("SEQ_CLS")},
}

# test file -> name of a module-level tuple -> entries to append
TUPLES: dict[str, dict[str, list[Any]]] = {"test_config": {"ALL_CONFIG_CLASSES": [(FPSConfig, {})]}}

# test file -> name of a module-level dict -> entries to add
DICTS: dict[str, dict[str, dict[str, Any]]] = {
    "test_torch_compile": {
        "SETTINGS": {
            "fps": (FPSConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "v_proj"], per_neuron=4), {})
        }
    },
    "test_vision_models": {
        "CONFIGS": {
            "fps": FPSConfig(
                target_modules=["convolution"], modules_to_save=["classifier", "normalization"], per_neuron=2
            )
        }
    },
}

# test file -> name of a test -> (name of its parameter, entries to append to the list in its decorator)
DECORATORS: dict[str, dict[str, tuple[str, list[Any]]]] = {
    "test_config": {"test_save_pretrained_with_target_modules": ("config_class", [FPSConfig])},
    "test_custom_models": {
        "test_multiple_adapters_mixed_modules_to_save": ("config_cls", [_SMALL]),
        "test_multiple_adapters_mixed_modules_to_save_order_switched": ("config_cls", [_SMALL]),
        "test_adapter_name_makes_no_difference": ("config0", [FPSConfig(**_LIN0)]),
    },
    "test_low_level_api": {
        "test_base_model_module_named_like_peft_prefix": ("config_cls", [_SMALL]),
        "test_inject_from_state_dict_and_from_config_target_same_layers": ("config", [FPSConfig(per_neuron=2)]),
    },
    "test_other": {
        "test_self_targeting_is_ignored": (
            "config_cls, config_kwargs",
            [
                (FPSConfig, {"target_modules": "l1.*", "per_neuron": 1}),
                (FPSConfig, {"target_modules": "l2.*", "per_neuron": 1}),
            ],
        ),
    },
}

# tests without a method parameter that nevertheless check every registered method
UNPARAMETRISED = {"test_from_peft_type"}

_BASE_BIAS = "FPS has no bias='fps_only' and saves bias deltas, never the base model's biases that the test changes"

# test, part of the case's id, why FPS fails it on purpose
EXPECTED_FAILURES = (
    ("test_save_load_roundtrip_fsdp_wrapped_learnable_bias", "", _BASE_BIAS),
    ("test_only_params_are_updated", "bias only", "the tensor of no selected entries is empty and cannot change"),
)
