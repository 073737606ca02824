"""What a model computes for a split: logits, frozen features, and how far two computations differ."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from peft_fps.vision.labelled_examples import Collate, LabelledExamples


TOLERANCE = 1e-4
"""Largest difference of two float32 computations of the same logits, as a share of the largest logit."""


@dataclass(frozen=True)
class Predictor:
    """Runs models over splits in evaluation mode, without gradients, in the precision of their weights.

    Args:
        device: where models and batches go.
        batch_size: examples per batch.
        collator: makes a batch of examples.
        workers: processes that prepare examples.
    """

    device: torch.device
    batch_size: int
    collator: Collate
    workers: int

    def logits(self, model: nn.Module, split: LabelledExamples, title: str) -> Tensor:
        """Return the logits, float32 `(examples, classes)` on the CPU; `title` is shown beside the progress bar."""
        outputs: list[Tensor] = []
        self._run(model, split, title, lambda output: outputs.append(output.logits.float().cpu()))
        return torch.cat(outputs)

    def features(self, model: nn.Module, head: nn.Module, split: LabelledExamples, title: str) -> Tensor:
        """Return the inputs of the output head, float32 `(examples, features)` on the CPU; `title` as for `logits`."""
        inputs: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(1).float().cpu()))
        try:
            self._run(model, split, title, lambda output: None)
        finally:
            hook.remove()
        return torch.cat(inputs)

    @torch.no_grad()
    def _run(self, model: nn.Module, split: LabelledExamples, title: str, consume: Callable[[Any], None]) -> None:
        """Run the model over the split's batches in order, and pass each output to `consume`."""
        data: Any = split  # DataLoader takes whatever has a length and items
        loader = DataLoader(data, batch_size=self.batch_size, collate_fn=self.collator, num_workers=self.workers)
        model.to(self.device).eval()
        for batch in tqdm(loader, desc=title):
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            consume(model(**send_to_device(inputs, self.device)))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows of `logits`, `(images, classes)`, that are largest at `labels`, `(images,)`."""
    return float(accuracy_score(labels.numpy(), logits.argmax(-1).numpy()))


@dataclass(frozen=True)
class Agreement:
    """How two computations of the same logits compare.

    Attributes:
        largest_difference: of any logit, absolute.
        largest_logit: absolute, what the difference is to be seen against.
        different_predictions: images whose predicted class differs.
        images: number of images compared.
    """

    largest_difference: float
    largest_logit: float
    different_predictions: int
    images: int

    @classmethod
    def of(cls, logits: Tensor, others: Tensor) -> "Agreement":
        """Compare two logits, both `(images, classes)`."""
        return cls(
            largest_difference=float((logits - others).abs().max()),
            largest_logit=float(logits.abs().max()),
            different_predictions=int((logits.argmax(-1) != others.argmax(-1)).sum()),
            images=len(logits),
        )

    @property
    def holds(self) -> bool:
        """Whether all predictions are the same and the logits differ by rounding alone; NaN never does."""
        rounding = TOLERANCE * max(1.0, self.largest_logit)
        return self.largest_difference <= rounding and self.different_predictions == 0

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data, with the verdict."""
        return asdict(self) | {"holds": self.holds}
