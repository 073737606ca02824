"""The tables that name each kind of base layer name the same kinds; so does the description of the classes."""

import ast
import re
from pathlib import Path

from transformers.pytorch_utils import Conv1D

from peft_fps import layers
from peft_fps.base.substitution import KINDS
from peft_fps.calibration.own_forward import PRODUCTS
from peft_fps.layers.layer_types import LAYERS
from peft_fps.layers.linear import Linear


def test_a_forward_of_its_own_is_noticed_for_every_kind():
    assert set(KINDS) == set(LAYERS)


def test_the_product_of_every_kind_is_watched():
    """But for `Conv1D`, which calls no product with a weight alone: there the input of the call counts."""
    assert {kind for kind, _ in PRODUCTS.values()} == set(LAYERS) - {Conv1D}


def test_every_class_is_of_the_kind_for_which_it_is_entered():
    assert {base: kind.base_class for base, kind in LAYERS.items()} == {base: base for base in LAYERS}


def test_the_description_of_the_classes_is_the_order_in_which_python_looks_a_method_up():
    text = ast.get_docstring(ast.parse(Path(layers.__file__).read_text(encoding="utf-8")))
    described = re.findall(r"^\| `(\w+)` \|", text.partition("| class |")[2], re.MULTILINE)
    assert described == [kind.__name__ for kind in Linear.__mro__ if kind.__module__.startswith("peft_fps.")]
