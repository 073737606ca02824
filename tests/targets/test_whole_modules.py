"""What `modules_to_save` may name, by users and beside other adapters; files are in test_tampering."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from torch import Tensor, nn

from tests.support.helpers import (
    adapted,
    bits,
    config,
    images,
    layers_of,
    tiny_gpt2,
    tiny_mlp,
    tiny_vit,
    tokens,
    unchanged,
)


pytestmark = pytest.mark.filterwarnings("ignore:classifier. part of the model's output head:UserWarning")


class Two(nn.Module):
    """A part whose path ends with another's name, a container, and a part that holds others."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
        self.parts = nn.ModuleList([nn.Linear(4, 4)])
        self.head, self.side_head = nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts[0](self.body(x))
        return torch.cat([self.head(x), self.side_head(x)], -1)


WRONG: dict[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "no module": (tiny_gpt2, ["wtf"], "names 'wtf', expected the path"),
    "one of two is no module": (tiny_gpt2, ["wte", "score"], "names 'score', expected the path"),
    "an end that begins at no dot": (tiny_vit, ["ssifier"], "names 'ssifier', expected the path"),
    "an expression": (tiny_vit, ["class.*"], "names 'class"),
    "one within the other": (Two, ["body", "body.1"], "body.1 and body, in which it lies, are both"),
    "part of a layer that will carry the adapter": (tiny_vit, ["classifier", "layer"], "names 'layer', expected"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_name_that_cannot_be_trained_whole_is_refused(case: str) -> None:
    build, names, says = WRONG[case]
    model = build()
    with unchanged(model), pytest.raises(ValueError, match=f"{says}.*Pass modules_to_save with other names"):
        get_peft_model(model, config(modules_to_save=names))
    assert not hasattr(model, "peft_config")


def test_a_name_means_no_part_of_the_adapters_own_layers() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(3, 3), "first": nn.Linear(3, 3)})
    adapter = get_peft_model(model, config(target_modules=["first"], modules_to_save=["layer"]))
    wrapped = {path for path, module in adapter.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"}
    assert wrapped == {"base_model.model.layer"}


def test_a_container_means_its_members() -> None:
    model = get_peft_model(Two(), config(modules_to_save=["parts"]))
    wrapped = {path for path, module in model.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"}
    assert wrapped == {"base_model.model.parts.0"}


@pytest.mark.parametrize("names", [["wte"], ["h.0.ln_1", "ln_f"], ["lm_head"], ["mlp"], ["transformer.h.0"]])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning")
def test_any_module_apart_from_the_targets_may_be_trained_whole(names: list[str], tmp_path: Any) -> None:
    model = adapted(tiny_gpt2(), modules_to_save=names)
    wholes = {path for path, module in model.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"}
    assert wholes
    assert not any(f"{path}.".startswith(f"{whole}.") for path in layers_of(model) for whole in wholes)
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "saved")
    assert bits(again(tokens()).logits) == bits(model(tokens()).logits)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", TaskType.SEQ_CLS])
def test_names_that_peft_enters_for_a_task_need_not_be_there(task_type: Any, tmp_path: Any) -> None:
    model = get_peft_model(tiny_vit(), config(task_type=task_type))
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tiny_vit(), tmp_path / "saved")
    assert bits(loaded(pixel_values=images()).logits) == bits(model.eval()(pixel_values=images()).logits)


def test_a_module_whose_path_ends_alike_but_not_behind_a_dot_is_another_one() -> None:
    model = get_peft_model(Two(), config(modules_to_save=["head"]))
    assert layers_of(model).keys() == {"body.0", "body.1", "parts.0", "side_head"}
    assert "head.modules_to_save.default.weight" in model.base_model.model.state_dict()


# --- beside other adapters ------------------------------------------------------------------------------------------


PART = "is to be trained whole .*, but is a module with a part that another adapter changes"
BESIDE: dict[str, tuple[list[str] | None, str, list[str], str]] = {
    # what the first adapter, of q_proj, trains whole; a second one's target and what it trains whole; what is said
    "a layer with changes": (
        *(None, "fc1", ["q_proj"]),
        "q_proj is to be trained whole .*, but is a layer that carries sparse changes of another adapter",
    ),
    "its base": (None, "fc1", ["q_proj.base_layer"], "names 'q_proj.base_layer', expected the path"),
    "around a layer with changes": (None, "fc1", ["attention"], f"attention {PART}, q_proj"),
    "around a module trained whole": (["fc1"], "k_proj", ["mlp"], f"mlp {PART}, fc1"),
    "within a module trained whole": (["mlp"], "k_proj", ["fc1"], "names 'fc1', expected the path"),
    "the original": (
        *(None, "k_proj", ["classifier.original_module"]),
        "names 'classifier.original_module', expected the path",
    ),
    "the other adapter's name": (None, "k_proj", ["first"], "names 'first', expected the path"),
    "a target within a module trained whole": (
        *(["mlp"], "fc1", []),
        r"fc1: another adapter trains \S+mlp whole \(modules_to_save\), expected a target outside of it",
    ),
}


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("case", BESIDE)
def test_another_adapters_modules_are_refused_and_stay_as_they_are(case: str, merged: bool) -> None:
    first, target, second, says = BESIDE[case]
    model = adapted(tiny_vit(), "first", target_modules=["q_proj"], modules_to_save=first)
    if merged:
        model.merge_adapter()
    with torch.no_grad():
        expected = model(pixel_values=images()).logits
    with unchanged(model), pytest.raises(ValueError, match=says):
        model.add_adapter("second", config(target_modules=[target], modules_to_save=second))
    assert torch.equal(model(pixel_values=images()).logits, expected)
    assert list(model.peft_config) == ["first"]


def test_two_adapters_may_train_the_same_module_whole() -> None:
    model = adapted(tiny_vit(), "first", modules_to_save=["classifier", "vit.layernorm"])
    model.add_adapter("second", config(modules_to_save=["layernorm"]))
    assert model.base_model.model.vit.layernorm.modules_to_save.keys() == {"first", "second"}
    assert model.base_model.model.classifier.modules_to_save.keys() == {"first"}


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "QUESTION_ANS"])
def test_a_task_of_which_the_model_is_not_capable_is_refused_before_anything_changes(task_type: str) -> None:
    model = tiny_mlp()
    with unchanged(model), pytest.raises(ValueError, match=f"task_type is '{task_type}', expected a model of transf"):
        get_peft_model(model, config(task_type=task_type))
    assert not hasattr(model, "peft_config")
