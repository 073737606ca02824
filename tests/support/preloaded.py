"""What the server of `tests.support.forked` does before it forks: import libraries, and build the CPU kernel."""

import gc

import ipykernel.kernelapp
import matplotlib.backends.backend_agg
import sklearn.datasets
import sklearn.model_selection
import transformers.trainer

import peft_fps.plots
from peft_fps.sparse.kernels import cpu
from tests.support import beside_torchvision, helpers


cpu.library()
gc.collect()
gc.freeze()  # a Trainer collects at the end of every training

__all__ = ["beside_torchvision", "helpers", "ipykernel", "matplotlib", "peft_fps", "sklearn", "transformers"]
