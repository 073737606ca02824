"""What a head is, over the classes of transformers' Auto models, against what each class adds to its backbone's."""

import copy
import gc
import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from peft_fps.base.head import Head, find_head
from peft_fps.targets.default_targets import default_targets
from peft_fps.targets.target_checks import check_untied
from tests.support.helpers import config


# weight norm of the positional convolution in models of speech
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pos_conv_embed.conv. its weight is computed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* asks with isinstance for its class:UserWarning"),  # Parakeet
]


@pytest.fixture(scope="module", autouse=True)
def imported_models() -> Iterator[None]:
    """Leaves what was imported, most of transformers, out of the garbage collections of later tests."""
    yield
    backbone_parameters.cache_clear()
    gc.collect()
    gc.freeze()


# --- models: on the meta device, two layers deep, as wide as by default ---------------------------------------------

DEPTH = re.compile(r"(^|_)(num_hidden_layers|num_layers|n_layers?|(num_)?(encoder|decoder)_layers)$")
STAGES = ("depths", "stage_num_blocks", "stage_numb_of_layers", "stage_num_of_layers")
SIZES: dict[str, dict[str, Any]] = {
    "VideoMAEConfig": {"image_size": 32, "num_frames": 2, "decoder_num_hidden_layers": 1},
    "Wav2Vec2BertConfig": {"vocab_size": 20},
    "Wav2Vec2ConformerConfig": {"vocab_size": 20},
}

# Libraries that are not installed, or a default config from which its own class cannot be built
NOT_BUILT = 0.2


def tiny_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    result = kind(**SIZES.get(kind.__name__, {}))
    shallow(result)
    return result


def shallow(some: PreTrainedConfig) -> None:
    for name, value in list(vars(some).items()):
        if isinstance(value, PreTrainedConfig):
            shallow(value)
        elif DEPTH.search(name) and isinstance(value, int) and value > 2:
            setattr(some, name, 2)
        elif name in STAGES and isinstance(value, (list, tuple)) and all(isinstance(each, int) for each in value):
            setattr(some, name, type(value)(min(each, 2) for each in value))
    if isinstance(kinds := getattr(some, "layer_types", None), list):
        some.layer_types = kinds[: getattr(some, "num_hidden_layers", None)]


def build(kind: type[PreTrainedModel], size: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind(copy.deepcopy(size))
        model.tie_weights()
        return model


@cache
def backbone_parameters(kind: type[PreTrainedConfig]) -> frozenset[str] | None:
    """Names in the class that AutoModel takes for the config; None if it takes none."""
    try:
        kinds = modeling_auto.MODEL_MAPPING[kind]
    except KeyError:
        return None
    size = tiny_config(kind)
    models = [build(each, size) for each in (kinds if isinstance(kinds, (tuple, list)) else [kinds])]
    return frozenset(name for model in models for name, _ in model.named_parameters(remove_duplicate=False))


def new_parameters(model: PreTrainedModel, backbone: frozenset[str]) -> set[str]:
    """Names of what the backbone's class does not have, under whichever path the backbone stands."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    paths = {".".join(name.split(".")[:depth]) for name in names for depth in range(3)}
    found = [{name for name in names if name.removeprefix(f"{path}.") in backbone} for path in paths | {""}]
    return names - max(found, key=len)


def classes(task: str) -> Iterator[tuple[type[PreTrainedConfig], type[PreTrainedModel]]]:
    for kind, models in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING").items():
        for model in models if isinstance(models, (tuple, list)) else [models]:
            yield kind, model


def models_for(task: str, every: int = 1) -> Iterator[tuple[type[PreTrainedConfig], PreTrainedModel]]:
    chosen = list(classes(task))[::every]
    failed = []
    for kind, model in chosen:
        try:
            found = build(model, tiny_config(kind))
        except ImportError:  # timm's backbones, in detectors
            continue
        except Exception as error:
            failed.append(f"{model.__name__}: {error!r}")
            continue
        yield kind, found
    assert len(failed) <= max(3, NOT_BUILT * len(chosen)), failed


# --- the law --------------------------------------------------------------------------------------------------------

NEW = [
    "IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "INSTANCE_SEGMENTATION", "UNIVERSAL_SEGMENTATION",
    "OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "QUESTION_ANSWERING", "TABLE_QUESTION_ANSWERING",
    "VISUAL_QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING", "TOKEN_CLASSIFICATION", "SEQUENCE_CLASSIFICATION",
    "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION", "CTC", "AUDIO_CLASSIFICATION", "AUDIO_FRAME_CLASSIFICATION",
    "AUDIO_XVECTOR", "DEPTH_ESTIMATION", "POSE_ESTIMATION", "VIDEO_CLASSIFICATION", "MASKED_IMAGE_MODELING",
    "IMAGE_TO_IMAGE", "TIME_SERIES_CLASSIFICATION", "TIME_SERIES_REGRESSION", "TIME_SERIES_PREDICTION",
]  # fmt: skip

FROM_THE_CHECKPOINT = {
    # new beside what AutoModel builds, but within the backbone, whose checkpoints have it
    r"BlipForQuestionAnswering": r".*",  # puts out tokens
    r"Gte\w*|NomicBert\w*|Data2VecVision\w*": r"\w+\.pooler\..*",
    r"\w+ForMaskedImageModeling": r"\w+\.embeddings\.mask_token",
    r"Perceiver\w+": r"perceiver\.(input_preprocessor|decoder\.(?!decoder\.final_layer)).*",
    r"RTDetrForObjectDetection": r"model\.decoder\.bbox_embed\..*",
}
SIZED_BY_LABELS = re.compile(
    r"(model\.)+(decoder\.class_embed|transformer_module\.decoder\.class_embed|denoising_class_embed|enc_score_head|"
    r"enc_out_class_embed)(\.\d+)?\.(weight|bias)"
)


def under(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


@pytest.mark.parametrize("task", NEW)
def test_what_is_new_is_trained_whole_and_nothing_else(task: str) -> None:
    """Every second model is asked for its targets, too: each is built once."""
    wrong = []
    for number, (kind, model) in enumerate(models_for(task)):
        head, name, backbone = find_head(model), type(model).__name__, backbone_parameters(kind)
        if number % 2 == 0:
            wrong += neither_target_nor_head(model, head)
        new = new_parameters(model, backbone) if backbone is not None else set()
        if not new:
            continue  # see the classes by name below
        known = [names for pattern, names in FROM_THE_CHECKPOINT.items() if re.fullmatch(pattern, name)]
        for parameter in new:
            exempt = any(re.fullmatch(names, parameter) for names in known)
            if not exempt and not under(parameter, head.modules) and parameter not in head.parameters:
                wrong.append(f"{name}: {parameter} is new, and not trained")
        for parameter, _ in model.named_parameters(remove_duplicate=False):
            old = parameter not in new and not SIZED_BY_LABELS.fullmatch(parameter)
            if old and (under(parameter, head.modules) or parameter in head.parameters):
                wrong.append(f"{name}: {parameter} is the backbone's, and trained whole")
    assert wrong == []


def neither_target_nor_head(model: PreTrainedModel, head: Head) -> list[str]:
    """Layers that are not either a target or the head.

    What odd attentions read themselves is to be neither, nor what Parakeet's subsampling asks for its class.
    """
    targets, name = default_targets(model, config(), head), type(model).__name__
    if not name.startswith("PPDocLayout"):  # ties layers within the backbone
        check_untied(model, sorted(targets))
    attentions = [
        path
        for path, part in model.named_modules()
        if isinstance(part, nn.MultiheadAttention)
        and (type(part).forward is not nn.MultiheadAttention.forward or part.in_proj_weight is None)
    ]
    asking = [
        path for path, part in model.named_modules() if type(part).__name__ == "ParakeetEncoderSubsamplingConv2D"
    ]
    inner = [f"{path}.layers" for path in asking]
    outside = [*head.modules, *head.output_embeddings, *attentions, *inner]
    layers = [path for path, part in model.named_modules() if type(part) in (nn.Linear, nn.Conv2d, Conv1D)]
    return [
        f"{name}: {path} is {'a target' if path in targets else 'no target'}"
        for path in layers
        if under(f"{path}.", outside) == (path in targets)
    ]


@pytest.mark.parametrize(
    ("task", "every"),
    [
        ("MASKED_LM", 1), ("SEQ_TO_SEQ_CAUSAL_LM", 1), ("SPEECH_SEQ_2_SEQ", 2), ("CAUSAL_LM", 5),
        ("IMAGE_TEXT_TO_TEXT", 9), ("TEXT_TO_WAVEFORM", 4),
    ],
)  # fmt: skip
def test_of_language_models_output_embeddings_alone_are_left_out(task: str, every: int) -> None:
    """The independent fact: a layer that has as many rows as there are tokens, or that is tied to an embedding."""
    wrong = []
    for number, (_, model) in enumerate(models_for(task, every)):
        head, name = find_head(model), type(model).__name__
        if task in ("MASKED_LM", "CAUSAL_LM") and number % 2 == 0:
            wrong += neither_target_nor_head(model, head)
        if head.parameters or [path for path in head.modules if not path.startswith("embedding_decoder")]:
            wrong.append(f"{name}: {head} is trained whole")  # Perceiver's bias for bytes is none of a layer
        output = model.get_output_embeddings()
        if isinstance(output, nn.Linear):
            paths = [path for path, part in model.named_modules() if part is output]
            if not set(paths) <= set(head.output_embeddings):
                wrong.append(f"{name}: {paths} are not left out")
        embeddings = {id(p) for part in model.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
        sizes = {part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)}
        for path in head.output_embeddings:
            for part in model.get_submodule(path).modules():
                if isinstance(part, nn.Linear):
                    sized = {part.out_features, part.out_features + 1, part.in_features} & sizes
                    odd = name.startswith(
                        ("IBert", "Kyutai", "Mllama")
                    )  # embeddings of another class, or with more rows
                    if not odd and not sized and id(part.weight) not in embeddings:
                        wrong.append(f"{name}: {path} is none")
    assert wrong == []


@pytest.mark.parametrize(("task", "every"), [("PRETRAINING", 3), ("RETRIEVAL", 1)])
def test_every_layer_is_a_target_or_the_head_and_all_targets_can_be_adapted(task: str, every: int) -> None:
    assert [
        wrong for _, model in models_for(task, every) for wrong in neither_target_nor_head(model, find_head(model))
    ] == []


# --- classes that AutoModel has no backbone for, or that are one themselves -----------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    {
        "UperNetForSemanticSegmentation": ["decode_head", "auxiliary_head"],
        "DepthAnythingForDepthEstimation": ["neck", "head"],
        "ZoeDepthForDepthEstimation": ["neck", "relative_head", "metric_head"],
        "VitPoseForPoseEstimation": ["head"],
        "HGNetV2ForImageClassification": ["fc"],
        "EomtForUniversalSegmentation": ["class_predictor"],
        "ParakeetForCTC": ["ctc_head"],
        "CLIPForImageClassification": ["classifier"],
        "SiglipForImageClassification": ["classifier"],
        "T5ForQuestionAnswering": ["qa_outputs"],
        "CLIPModel": [],
        "SiglipModel": [],
        "CLIPVisionModelWithProjection": [],
        "SamModel": [],
        "LightGlueForKeypointMatching": [],
        "ViTMAEForPreTraining": [],
        "LlavaForConditionalGeneration": [],
        "Blip2ForConditionalGeneration": [],
    }.items(),
)
def test_heads_by_name(kind: str, expected: list[str]) -> None:
    model: Any = getattr(transformers, kind)
    found = build(model, tiny_config(model.config_class))
    assert find_head(found).modules == expected
    assert find_head(found).parameters == []


@pytest.mark.parametrize("kind", ["VisionEncoderDecoderModel", "LlavaForConditionalGeneration"])
def test_what_joins_two_models_is_a_target(kind: str) -> None:
    if kind == "LlavaForConditionalGeneration":
        model: Any = build(transformers.LlavaForConditionalGeneration, tiny_config(transformers.LlavaConfig))
        joint = {"model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"}
    else:
        vision, text = (
            transformers.ViTConfig(hidden_size=24, num_attention_heads=2),
            transformers.GPT2Config(n_layer=1),
        )
        text.update({"is_decoder": True, "add_cross_attention": True})
        both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
        model, joint = build(transformers.VisionEncoderDecoderModel, both), {"enc_to_dec_proj"}
    assert joint <= default_targets(model, config(), find_head(model))
    assert {name.rpartition(".")[2] for name in find_head(model).output_embeddings} == {"lm_head"}


@pytest.mark.parametrize("task", ["IMAGE", "TEXT_ENCODING", "BACKBONE", "MASK_GENERATION"])
def test_backbones_have_no_head(task: str) -> None:
    for _, model in models_for(task, every=3):
        if not re.search(r"For[A-Z]", type(model).__name__):
            assert find_head(model).modules == [], type(model).__name__
            assert find_head(model).parameters == [], type(model).__name__
