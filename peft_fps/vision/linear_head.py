"""The baseline: a linear classifier on the features of the frozen model."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor


STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
"""Inverse regularisation strengths C to choose from."""


@dataclass(frozen=True)
class LinearHead:
    """A logistic regression on standardised features, its regularisation chosen on the validation split.

    Attributes:
        classifier: the fitted classifier.
        strength: the chosen C.
        validation: accuracy on the validation split by C.
    """

    classifier: Pipeline
    strength: float
    validation: dict[float, float]

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Return the share of rows of `features`, `(images, features)`, classified as `labels`, `(images,)`."""
        return float(accuracy_score(labels.numpy(), self.classifier.predict(features.numpy())))

    def as_layer(self) -> tuple[Tensor, Tensor]:
        """Return weight `(classes, features)` and bias `(classes,)`, float32, of the linear layer with its logits.

        Its classes are those of the training split, in order. Of two classes, scikit-learn has the difference of the
        logits alone; half of it goes to each.
        """
        scaler, regression = self.classifier[0], self.classifier[-1]
        weight = regression.coef_ / scaler.scale_
        bias = regression.intercept_ - weight @ scaler.mean_
        if len(weight) == 1:
            weight, bias = (np.concatenate([-half, half]) for half in (weight / 2, bias / 2))
        return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()


def fit_linear_head(train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]) -> LinearHead:
    """Fit on the training split for every C and keep the one that is best on the validation split.

    Args:
        train: features `(images, features)` and class indices `(images,)`.
        validation: the same of the validation split.
    """
    fitted: dict[float, Pipeline] = {}
    scores: dict[float, float] = {}
    for strength in STRENGTHS:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000))
        classifier.fit(train[0].numpy().astype(np.float64), train[1].numpy())
        fitted[strength] = classifier
        scores[strength] = LinearHead(classifier, strength, {}).accuracy(*validation)
    best = max(scores, key=lambda strength: (scores[strength], -strength))
    return LinearHead(fitted[best], best, scores)
