"""The maths of a frozen weight W plus a sparse change ΔW: structure, composition, products and their gradients.

The functions take tensors and return tensors. They know nothing of PEFT, transformers or modules.

| module | subject |
|---|---|
| `layout` | how a weight that reads as `(neurons, inputs)` is stored |
| `structure` | where the selected entries of one weight lie |
| `compose` | dense tensors of W + ΔW |
| `autograd`, `convolution_autograd`, `embedding` | linear layers, convolutions and lookups with W + ΔW |
| `products`, `kernels` | products with ΔW alone and the gradient of its values; compiled kernels for them |
| `keeping` | what a product keeps of its input for backward |
| `stand_ins` | tensors in place of a module's parameters, formed again in backward |
| `transforms` | plain operators for transforms that do not support our autograd functions |
"""

from peft_fps.sparse.autograd import sparse_delta_linear, sparse_linear
from peft_fps.sparse.compose import changed_weight, compose_weight, dense_delta, merged_entries, sums
from peft_fps.sparse.convolution_autograd import Geometry, convolve, sparse_convolution
from peft_fps.sparse.embedding import add_token_products, changed_lookup
from peft_fps.sparse.keeping import Kept, Reading, keep_columns, keep_whole
from peft_fps.sparse.layout import Layout
from peft_fps.sparse.structure import (
    Structure,
    StructureError,
    build_structure,
    check_entries,
    check_finite,
    check_floating,
    even_row_counts,
    unite_structures,
)
from peft_fps.sparse.transforms import is_jit_tracing, needs_operators


__all__ = [
    "Geometry",
    "Kept",
    "Layout",
    "Reading",
    "Structure",
    "StructureError",
    "add_token_products",
    "build_structure",
    "changed_lookup",
    "changed_weight",
    "check_entries",
    "check_finite",
    "check_floating",
    "compose_weight",
    "convolve",
    "dense_delta",
    "even_row_counts",
    "is_jit_tracing",
    "keep_columns",
    "keep_whole",
    "merged_entries",
    "needs_operators",
    "sparse_convolution",
    "sparse_delta_linear",
    "sparse_linear",
    "sums",
    "unite_structures",
]
