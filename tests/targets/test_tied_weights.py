"""Ties with an adapted embedding that its changes cannot follow."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import Tensor, nn

from tests.support.helpers import (
    adapted,
    bits,
    config,
    dense_change,
    layers_of,
    tiny_gpt2,
    tiny_llama,
    tokens,
    unchanged,
)
from tests.support.language_models import tiny_t5


TOKENS, WIDTH = 9, 4


class Tied(nn.Module):
    """Words that are read and written by the same weight."""

    def __init__(self, writes: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.write = writes(WIDTH, TOKENS)
        self.write.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.mix(self.words(x)))


class OwnWrite(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Holder(nn.Module):
    """Reads the weight of words through a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(TOKENS, WIDTH)
        self.table = self.words.weight


def offloaded() -> Tied:
    """As accelerate leaves a module whose weights it keeps away."""
    base = Tied()
    base.write._hf_hook = SimpleNamespace(offload=True)
    return base


class Limited(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(TOKENS, WIDTH, max_norm=1.0)


def limited() -> nn.Module:
    base = Tied()
    base.again = Limited()
    base.again.weight = base.words.weight
    return base


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "own forward": (lambda: Tied(OwnWrite), {}, "write.weight .*OwnWrite has a forward of its own"),
    "parameter": (lambda: nn.ModuleDict({"outer": Holder()}), {}, "outer.table .*which is part of a Holder"),
    "both": (Tied, {"target_modules": ["words", "write"]}, "names both, expected one of them.* Name words alone"),
    "output alone": (Tied, {"target_modules": ["write"]}, "write.weight .*tied weights.*name the embedding words"),
    "offloaded": (offloaded, {}, "write.weight .*which accelerate offloads, expected tied weights at hand"),
    "max_norm": (limited, {}, "again.weight .*but its max_norm=1.0 makes every lookup write to the weight"),
    "trained whole": (Tied, {"modules_to_save": ["write"]}, "write shares the weight of the embedding words"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_ties_that_cannot_follow_are_refused_by_name(kind: str) -> None:
    build, options, message = REFUSED[kind]
    base = build()
    with unchanged(base), pytest.raises(ValueError, match=message):
        get_peft_model(base, config(**({"target_modules": ["words"]} | options)))


def test_another_adapter_cannot_train_a_tied_use_whole() -> None:
    model, x = adapted(Tied(), target_modules=["words"]), tokens(2, 5, vocabulary=TOKENS)
    expected = bits(model(x))
    with pytest.raises(ValueError, match="write shares the weight of the embedding that another adapter changes"):
        model.add_adapter("other", config(target_modules=["mix"], modules_to_save=["write"]))
    assert bits(model(x)) == expected


def test_tied_embeddings_that_accelerate_offloads_are_refused() -> None:
    base = tiny_gpt2()
    cpu_offload(base.transformer.wte, execution_device=torch.device("cpu"))
    message = r"transformer\.wte\.weight is tied \(lm_head\.weight\) and accelerate offloads it"
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(target_modules=["wte"]))
    assert not any("fps" in name for name, _ in base.named_modules())


def test_an_offloaded_embedding_of_its_own_computes_with_its_changes() -> None:
    base, plain = tiny_llama(), tiny_llama()
    cpu_offload(base.model.embed_tokens, execution_device=torch.device("cpu"))
    model = adapted(base, target_modules=["embed_tokens"])
    layer: Any = layers_of(model)["model.embed_tokens"]
    with torch.no_grad(), layer.weight_at_hand():
        plain.model.embed_tokens.weight += dense_change(layer).float()
    torch.testing.assert_close(model(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)


def test_a_copy_that_other_modules_do_not_follow_is_named() -> None:
    with pytest.warns(UserWarning, match=r"shared, which is trained whole .* decoder.embed_tokens.* target_modules"):
        get_peft_model(tiny_t5(), config(modules_to_save=["shared"]))
