import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature

from peft_fps.vision.classifiers import classifier, load_model, load_processor
from peft_fps.vision.labelled_images import LabelledImages
from peft_fps.vision.pixels import Collator, ImageSplit
from peft_fps.vision.prediction import Agreement, Predictor
from tests.vision.conftest import picture


@pytest.mark.parametrize("workers", [0, 1])
def test_features_are_what_the_head_turns_into_logits(tiny_model, workers):
    model = load_model(str(tiny_model), ["no", "yes"], seed=0)
    images = Dataset.from_dict({"image": [picture(0, n) for n in range(5)]}, Features({"image": ImageFeature()}))
    split = ImageSplit(LabelledImages(images, [0] * 5), load_processor(str(tiny_model), None))
    predictor = Predictor(torch.device("cpu"), 2, Collator(False), workers)
    features = predictor.features(model, classifier(model), split, "features")
    logits = predictor.logits(model, split, "logits")
    assert features.shape == (5, 32)
    torch.testing.assert_close(torch.nn.functional.linear(features, model.classifier.weight), logits)
    with torch.no_grad():
        pixels = torch.stack([split[row]["pixel_values"] for row in range(5)])
        torch.testing.assert_close(model(pixels).logits, logits)


def test_agreement_up_to_rounding():
    logits = torch.tensor([[1.0, 2.0], [-50.0, 3.0]])
    assert Agreement.of(logits, logits.clone()).to_dict() == {
        "largest_difference": 0.0,
        "largest_logit": 50.0,
        "different_predictions": 0,
        "images": 2,
        "holds": True,
    }
    assert Agreement.of(logits, logits + 1e-4).holds


@pytest.mark.parametrize(
    ("other", "different"),
    [
        ([[1.0, 2.0], [-50.0, 3.1]], 0),
        ([[2.0, 1.0], [-50.0, 3.0]], 1),
        ([[float("nan"), 2.0], [-50.0, 3.0]], 1),
    ],
)
def test_disagreement(other, different):
    agreement = Agreement.of(torch.tensor([[1.0, 2.0], [-50.0, 3.0]]), torch.tensor(other))
    assert agreement.different_predictions == different
    assert not agreement.holds


def test_a_tie_that_falls_the_other_way_is_a_disagreement():
    agreement = Agreement.of(torch.tensor([[1.0, 1.0 + 1e-6]]), torch.tensor([[1.0 + 1e-6, 1.0]]))
    assert agreement.different_predictions == 1
    assert not agreement.holds
