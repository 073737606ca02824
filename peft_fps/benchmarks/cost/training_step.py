"""One training step of a method."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_fps.benchmarks.cost.methods import ALL_METHODS
from peft_fps.benchmarks.cost.random_models import batches
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.benchmarks.environment import switched
from peft_fps.vision.training_loop import trained_parameters


class Training:
    """A method's model with AdamW and a batch.

    The learning rate is 0, which costs what any other costs, so that methods can share the memory of their weights.

    Args:
        name: key of the method in `ALL_METHODS`.
        base: the model to fine-tune, which is not changed.
        workload: batch size and precision.
        compiled: run the model by `torch.compile`.
    """

    def __init__(self, name: str, base: PreTrainedModel, workload: Workload, compiled: bool = False) -> None:
        self.workload = workload
        self.environment = ALL_METHODS[name].environment
        with switched(self.environment):
            self.model = ALL_METHODS[name].build(base, workload)
        if compiled:
            self.model.compile()
        trained = trained_parameters(self.model)
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0) if trained else None
        (self.batch,) = batches(base, workload.batch_size)

    def step(self) -> None:
        """Go forward, backward and one step of the optimizer; no gradient stays."""
        with switched(self.environment):
            self.loss().backward()
            if self.optimizer is not None:
                self.optimizer.step()
                self.optimizer.zero_grad()

    def loss(self) -> Tensor:
        """Return the loss of the batch."""
        with self.workload.autocast():
            loss: Tensor = self.model(**self.batch).loss
        return loss
