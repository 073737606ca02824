"""Let torchvision load in a notebook's kernel where its compiled part is made for another build of torch.

As `tests/conftest.py` does for the tests' own process: without two operators importing it fails, and with it timm, TRL
and parts of transformers.
"""

from importlib.util import find_spec

import torch


if find_spec("torchvision") is not None and "+cpu" in torch.__version__:
    _torchvision_operators = torch.library.Library("torchvision", "FRAGMENT")  # which are gone with it
    for _name in ("nms", "qnms"):
        if not torch._C._dispatch_has_kernel(f"torchvision::{_name}"):
            _torchvision_operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
