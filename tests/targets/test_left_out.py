"""Large weights that stay frozen are named, in one warning and in the report."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from peft_fps import FPSConfig, selection_report
from peft_fps.targets.left_out import left_out
from tests.support.helpers import tiny_bert, tiny_gpt2, tiny_mlp, tiny_vit
from tests.support.language_models import tiny_mixtral


class Parts(nn.Module):
    """Holds 2,000 numbers: 1,000 in an embedding, 960 in a layer, 21 in a parameter of its own, 19 in a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(100, 10)
        self.layer = nn.Linear(96, 10, bias=False)
        self.scale = nn.Parameter(nn.init.ones_(self.layer.weight.new_empty(21)))
        self.small = nn.Parameter(nn.init.ones_(self.layer.weight.new_empty(19)))


@pytest.mark.parametrize(
    ("covered", "expected"),
    [
        ([], {"tokens.weight": 0.5, "layer.weight": 0.48, "scale": 0.0105}),
        (["layer"], {"tokens.weight": 0.5, "scale": 0.0105}),
        (["layer", "tokens"], {"scale": 0.0105}),
    ],
    ids=str,
)
def test_weights_above_one_percent_and_their_shares(covered: list[str], expected: dict[str, float]) -> None:
    found = left_out(Parts(), covered)
    assert {weight.name: weight.share for weight in found} == pytest.approx(expected)
    assert list(expected) == [weight.name for weight in found]  # the largest first


class Block(nn.Module):
    """Holds a matrix of 9 and a vector of 9 numbers beside a layer of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4, bias=False)
        self.matrix, self.vector = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(9))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).repeat_interleave(2, -1) * self.matrix.sum() * self.vector.sum()


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(20))

    def forward(self, x: Tensor) -> Tensor:
        return sum(block(x) for block in self.blocks)


def test_small_weights_of_one_name_in_many_blocks_count_together() -> None:
    (found,) = left_out(Blocks(), [f"blocks.{number}.layer" for number in range(20)])
    assert (found.name, found.share) == ("blocks.*.matrix", 9 / (9 + 9 + 32))
    assert found.members == tuple(f"blocks.{number}.matrix" for number in range(20))
    (text,) = said(Blocks(), budget=0.2)
    assert "blocks.*.matrix (18.0%): of Block itself, in no layer" in text


def with_odd_layers() -> Blocks:
    model = Blocks()
    for block in model.blocks:
        block.inner = nn.Module()
        block.inner.odd = nn.Bilinear(3, 3, 1)
    return model


def test_layers_of_one_name_are_trained_whole_by_the_end_of_their_paths() -> None:
    (text,) = said(with_odd_layers(), budget=0.2)
    assert "blocks.*.inner.odd.weight (" in text
    assert "train them whole with modules_to_save=['inner.odd']" in text
    adapted = get_peft_model(
        with_odd_layers(), FPSConfig(budget=0.2, target_modules=["layer"], modules_to_save=["inner.odd"])
    )
    assert set(adapted.selection_report().left_out) == {"blocks.*.matrix"}


def said(model: nn.Module, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(model, FPSConfig(**{"budget": 0.05} | options))
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if text.startswith("Weights above 1 % of the model stay frozen")]


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_bert], ids=["gpt2", "bert"])
def test_default_targets_name_what_they_leave_out_once(build: Callable[[], Any]) -> None:
    base = build()
    expected = {
        name
        for name, parameter in base.named_parameters()
        if "embed" in name or ".wte." in name or ".wpe." in name
        if parameter.numel() > 0.01 * base.num_parameters() and parameter.dim() > 1
    }
    texts = said(base)
    assert len(texts) == 1
    assert expected
    for name in expected:
        assert f"{name} (" in texts[0]
        tied = build is tiny_gpt2 and name == "transformer.wte.weight"
        line = f"{name.removesuffix('.weight')!r}]"  # after the head, which is trained whole as it is
        assert (line in texts[0]) == (not tied)
    assert build is not tiny_gpt2 or "for all modules that share its weight" in texts[0]


def test_who_chooses_is_not_told() -> None:
    assert not said(tiny_gpt2(), target_modules=["c_fc"])
    assert not said(tiny_gpt2(), layers_to_transform=[0])  # the embeddings lie in no block
    assert not said(tiny_mlp(), budget=0.3)


def test_a_head_that_is_left_out_is_no_odd_kind() -> None:
    (text,) = said(tiny_vit(num_labels=100), modules_to_save=[])
    assert "classifier.weight" in text
    assert "outside the default targets; name it in target_modules, or train it whole with modules_to_save" in text
    assert "of Linear" not in text


def test_modules_trained_whole_are_not_left_out() -> None:
    whole = ["bert.embeddings", "classifier"]
    assert not any("embeddings" in text for text in said(tiny_bert(), modules_to_save=whole))


class Around(nn.Module):
    """A model in a part of another one, as sentence-transformers and SetFit hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_bert()
        self.head = nn.Linear(4, 4)

    def forward(self, **batch: Tensor) -> Any:
        return self.inner(**batch)


def test_of_an_adapter_in_a_part_of_the_model_the_report_names_what_lies_outside_of_its_layers() -> None:
    alone, outer = tiny_bert(), Around()
    for model in (alone, outer.inner):
        inject_adapter_in_model(FPSConfig(per_neuron=2, importance="magnitude"), model)
    expected = selection_report(alone).left_out
    assert expected
    total = sum(parameter.numel() for parameter in tiny_bert().parameters())
    shares = {f"inner.{name}": share * total / (total + 20) for name, share in expected.items()}
    assert selection_report(outer).left_out == pytest.approx(shares)


def test_the_last_line_of_the_report_names_them(tmp_path: Any) -> None:
    model = get_peft_model(tiny_gpt2(), FPSConfig(budget=0.05, target_modules=["c_fc"]))
    total = sum(parameter.numel() for parameter in tiny_gpt2().parameters())
    report = model.selection_report()
    assert report.left_out["transformer.wte.weight"] == tiny_gpt2().transformer.wte.weight.numel() / total
    attention = sum(block.attn.c_attn.weight.numel() for block in tiny_gpt2().transformer.h)
    assert report.left_out["transformer.h.*.attn.c_attn.weight"] == attention / total
    assert not any("c_fc" in name for name in report.left_out)
    last = str(report).splitlines()[-1]
    assert last.startswith("left out, above 1 % of the model: ")
    assert all(f"{name} ({share:.1%})" in last for name, share in report.left_out.items())
    assert report.to_dict()["left_out"] == report.left_out
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_gpt2(), tmp_path).selection_report().left_out == report.left_out


def test_a_report_says_if_nothing_is_left_out() -> None:
    report = get_peft_model(tiny_mlp(), FPSConfig(budget=0.3)).selection_report()
    assert str(report).splitlines()[-1] == "left out, above 1 % of the model: nothing"
    vit = get_peft_model(tiny_vit(), FPSConfig(budget=0.05)).selection_report()
    assert set(vit.left_out) <= {"vit.embeddings.position_embeddings", "vit.embeddings.cls_token"}


def test_experts_that_are_switched_off_are_not_said_to_be_unfit() -> None:
    assert not any("experts" in text for text in said(tiny_mixtral(), target_parameters=[]))


def test_a_head_that_another_adapter_trains_whole() -> None:
    model = get_peft_model(tiny_bert(), FPSConfig(budget=0.05))
    with pytest.warns(UserWarning, match="stay frozen"):
        model.add_adapter("other", FPSConfig(budget=0.05, modules_to_save=[]))
    assert not any("classifier" in name for name in model.selection_report("default").left_out)
