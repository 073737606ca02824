"""A model without any layer that is adapted by default is refused with the kinds of layers that it has."""

import pytest
from peft import get_peft_model
from torch import Tensor, nn
from transformers import IBertConfig, IBertForSequenceClassification

from tests.support.helpers import adapted, config, layers_of, unchanged


class Recurrent(nn.Module):
    """Layers of torch that are not adapted by default."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.memory, self.norm = nn.Embedding(9, 4), nn.LSTM(4, 4), nn.LayerNorm(4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.memory(self.words(ids))[0])


def tiny_ibert() -> IBertForSequenceClassification:
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 12, "max_position_embeddings": 10}
    return IBertForSequenceClassification(IBertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))


def test_a_model_of_quantised_layers_of_its_own_is_told_which() -> None:
    """`QuantLinear` is no `nn.Linear`. The one block has six; the head has layers of `nn.Linear`."""
    base = tiny_ibert()
    found = (
        r"^IBertForSequenceClassification has no layer of a kind that FPS adapts.*QuantLinear x6.*expected Linear, "
        r"Conv1D, Conv1d.*target_modules names them.*Nothing was changed"
    )
    for bias in ("all", "with_norms"):
        with unchanged(base), pytest.raises(ValueError, match=found):
            get_peft_model(base, config(bias=bias))


def test_classes_with_matrices_are_named() -> None:
    base = Recurrent()
    with unchanged(base), pytest.raises(ValueError, match=r"^Recurrent has no .* in Embedding x1, LSTM x1 outside"):
        get_peft_model(base, config())
    assert set(layers_of(adapted(Recurrent(), target_modules=["words"]))) == {"words"}


def test_a_model_without_a_matrix_is_told_so() -> None:
    with pytest.raises(ValueError, match=r"^Sequential has no layer of a kind .* found weight matrices in no module"):
        get_peft_model(nn.Sequential(nn.LayerNorm(4), nn.ReLU()), config())


@pytest.mark.parametrize("pattern", [None, "1"])
def test_blocks_that_the_model_does_not_have_are_named(pattern: str | None) -> None:
    base = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))))
    named = rf"^layers_to_transform=\[7\]{f' and layers_pattern={pattern!r}' if pattern else ''} name no block of Seq"
    with unchanged(base), pytest.raises(ValueError, match=rf"{named}.* its 2 layers, the last of which is 1\.1\.0\."):
        get_peft_model(base, config(layers_to_transform=[7], layers_pattern=pattern))
