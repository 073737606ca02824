"""What the server of `tests.forked` does before it forks: it imports libraries, and builds the kernel for the CPU."""

import gc

import ipykernel.kernelapp
import matplotlib.backends.backend_agg
import sklearn.datasets
import sklearn.model_selection
import transformers.trainer

import peft_fps.plots
from peft_fps.sparse.kernels import cpu
from tests import beside_torchvision, helpers


cpu.library()
gc.collect()
gc.freeze()  # a Trainer collects at the end of every training

__all__ = ["beside_torchvision", "helpers", "ipykernel", "matplotlib", "peft_fps", "sklearn", "transformers"]
