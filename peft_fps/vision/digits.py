"""The embedded data: scikit-learn's scans of handwritten digits, as images."""

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from peft_fps.vision.pretraining import to_pixels


TRAIN, VALIDATION = 800, 200
SPLIT_SEED = 0


def digits() -> DatasetDict:
    """Return the 1,797 digits as 32x32 RGB images: 800 for training, 200 for validation, 797 for test.

    The split is stratified and always the same. The scans are enlarged by the function that the embedded model was
    pre-trained with.
    """
    scans, labels = load_digits(return_X_y=True)
    pixels = to_pixels(torch.from_numpy(scans).reshape(-1, 8, 8))
    bytes_ = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    everything = {"image": [PILImage.fromarray(image) for image in bytes_], "label": labels.tolist()}
    dataset = Dataset.from_dict(everything, features=features)
    train, rest = train_test_split(range(len(labels)), train_size=TRAIN, stratify=labels, random_state=SPLIT_SEED)
    validation, test = train_test_split(rest, train_size=VALIDATION, stratify=labels[rest], random_state=SPLIT_SEED)
    parts = {"train": train, "validation": validation, "test": test}
    return DatasetDict({name: dataset.select(rows) for name, rows in parts.items()})
