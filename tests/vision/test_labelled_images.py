import io
import logging
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from sklearn.datasets import load_digits

from peft_fps.vision.labelled_images import load_images
from tests.vision.conftest import picture, write_classes


def table(labels, features=None, columns=("image", "label")):
    images = [picture(0, number) for number in range(len(labels))]
    features = features or Features({columns[0]: ImageFeature(), columns[1]: ClassLabel(names=["cat", "dog"])})
    return Dataset.from_dict({columns[0]: images, columns[1]: labels}, features=features)


def write_plain_parquet(path, labels):
    """As pandas or polars would write it: bytes in a struct, plain integers, no metadata of `datasets`."""
    rows = []
    for number in range(len(labels)):
        buffer = io.BytesIO()
        picture(1, number).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": image, "label": pa.array(labels, pa.int64())}), path)


def pixels(split):
    return [np.asarray(image).tobytes() for image in split.images["image"]]


def test_image_folder_with_splits(image_folder):
    data = load_images(str(image_folder), seed=0)
    assert data.classes == ["blue", "red"]
    assert [len(data.train), len(data.validation), len(data.test)] == [16, 6, 8]
    for split, start in ((data.train, 0), (data.validation, 100), (data.test, 200)):
        per_class = len(split) // 2
        expected = {
            (np.asarray(picture(label, start + number)).tobytes(), label)
            for label in (0, 1)
            for number in range(per_class)
        }
        assert set(zip(pixels(split), split.labels, strict=True)) == expected


def test_image_folder_without_splits_is_cut_in_three(tmp_path, caplog):
    write_classes(tmp_path / "photos", 50)
    with caplog.at_level(logging.WARNING):
        data = load_images(str(tmp_path / "photos"), seed=3)
    assert [len(data.train), len(data.validation), len(data.test)] == [64, 16, 20]
    for split in (data.train, data.validation, data.test):
        assert Counter(split.labels) == {0: len(split) // 2, 1: len(split) // 2}
    assert len({*pixels(data.train), *pixels(data.validation), *pixels(data.test)}) == 100
    assert "20 of the 100 train images become the test split" in caplog.text
    assert "16 of the 80 training images become the validation split" in caplog.text
    again = load_images(str(tmp_path / "photos"), seed=3)
    other = load_images(str(tmp_path / "photos"), seed=4)
    assert pixels(again.test) == pixels(data.test) != pixels(other.test)


def test_parquet_with_features(tmp_path):
    for split, labels in {"train": [0, 1, 1, 0], "validation": [1, 0], "test": [0]}.items():
        table(labels).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    (tmp_path / "meta.json").write_text("{}")
    data = load_images(str(tmp_path), seed=0)
    assert data.classes == ["cat", "dog"]
    assert [data.train.labels, data.validation.labels, data.test.labels] == [[0, 1, 1, 0], [1, 0], [0]]
    assert pixels(data.train) == [np.asarray(picture(0, number)).tobytes() for number in range(4)]


def test_parquet_of_another_library_with_gaps_in_the_labels(tmp_path):
    (tmp_path / "data").mkdir()
    for split, labels in {"train": [7, 3, 7, 11], "val": [11], "test": [3, 7]}.items():
        write_plain_parquet(tmp_path / "data" / f"{split}.parquet", labels)
    data = load_images(str(tmp_path), seed=0)
    assert data.classes == ["3", "7", "11"]
    assert [data.train.labels, data.validation.labels, data.test.labels] == [[1, 0, 1, 2], [2], [0, 1]]
    assert pixels(data.test) == [np.asarray(picture(1, number)).tobytes() for number in range(2)]


def test_parquet_files_that_tell_no_split_are_named(tmp_path, caplog):
    for name in ("train", "validation", "test", "extra"):
        table([0, 1]).to_parquet(tmp_path / f"{name}.parquet")
    data = load_images(str(tmp_path), seed=0)
    assert [len(data.train), len(data.validation), len(data.test)] == [2, 2, 2]
    assert "left out, since their names tell no split: extra.parquet" in caplog.text


@pytest.mark.parametrize(
    ("write", "name"), [(Dataset.to_parquet, "everything.parquet"), (Dataset.save_to_disk, "saved")]
)
def test_one_table_is_cut_in_three(tmp_path, write, name):
    write(table([0, 1] * 25), tmp_path / name)
    data = load_images(str(tmp_path / name), seed=0)
    assert [len(data.train), len(data.validation), len(data.test)] == [32, 8, 10]


def test_saved_by_datasets(tmp_path):
    splits = DatasetDict(train=table([0, 1, 0, 1]), validation=table([1, 0]), test=table([1]))
    splits.save_to_disk(tmp_path / "saved")
    data = load_images(str(tmp_path / "saved"), seed=0)
    assert [data.train.labels, data.validation.labels, data.test.labels] == [[0, 1, 0, 1], [1, 0], [1]]


def test_missing_test_split_is_half_of_validation(tmp_path, caplog):
    DatasetDict(train=table([0, 1]), validation=table([0, 1] * 10)).save_to_disk(tmp_path / "saved")
    data = load_images(str(tmp_path / "saved"), seed=0)
    assert len(data.train) == 2
    assert Counter(data.validation.labels) == Counter(data.test.labels) == {0: 5, 1: 5}
    assert not set(pixels(data.validation)) & set(pixels(data.test))
    assert "10 of the 20 validation images become the test split" in caplog.text


def test_missing_validation_split_is_a_fifth_of_training(tmp_path):
    DatasetDict(train=table([0, 1] * 10), test=table([0, 1])).save_to_disk(tmp_path / "saved")
    data = load_images(str(tmp_path / "saved"), seed=0)
    assert [len(data.train), len(data.validation), len(data.test)] == [16, 4, 2]


def test_columns_are_found_by_type_or_by_option(tmp_path):
    features = Features(
        {"scan": ImageFeature(), "patient": Value("int64"), "grade": ClassLabel(names=["low", "high"])}
    )
    rows = {"scan": [picture(0, number) for number in range(6)], "patient": [4, 5, 6, 4, 5, 6], "grade": [0, 1] * 3}
    part = Dataset.from_dict(rows, features=features)
    DatasetDict(train=part, validation=part, test=part).save_to_disk(tmp_path / "saved")
    assert load_images(str(tmp_path / "saved"), seed=0).classes == ["low", "high"]
    assert load_images(str(tmp_path / "saved"), 0, "scan", "patient").classes == ["4", "5", "6"]
    with pytest.raises(ValueError, match=r"--image-column is 'grade'.*scan \(Image\), patient \(int64\), grade"):
        load_images(str(tmp_path / "saved"), 0, image_column="grade")


def test_no_label_column_lists_what_was_found(tmp_path):
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    part = Dataset.from_dict({"image": [picture(0, 0)], "caption": ["red"]}, features=features)
    part.save_to_disk(tmp_path / "saved")
    message = r"image \(Image\), caption \(string\), expected one column of class labels or integers"
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path / "saved"), seed=0)


def test_no_image_column_lists_what_was_found(tmp_path):
    Dataset.from_dict({"label": [0, 1]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"the columns label \(int64\), expected an image column"):
        load_images(str(tmp_path / "saved"), seed=0)


def test_two_possible_label_columns_ask_for_a_name(tmp_path):
    features = Features({"image": ImageFeature(), "fine": Value("int32"), "coarse": Value("int32")})
    part = Dataset.from_dict({"image": [picture(0, 0)], "fine": [0], "coarse": [1]}, features=features)
    part.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="fine.*coarse.*--label-column"):
        load_images(str(tmp_path / "saved"), seed=0)


KNOWN = {"train": [0, 1], "validation": [1], "test": [0]}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (KNOWN | {"test": [0, -1]}, "'test' has the labels -1, which are no training class"),
        (KNOWN | {"test": [0, 9]}, "'test' has the labels 9, which are no training class"),
        (KNOWN | {"train": [0, 1, None]}, "'train' has the labels None"),
        ({"train": [5] * 10}, "1 class, expected at least 2"),
    ],
    ids=["negative", "unknown in training", "missing", "all alike"],
)
def test_labels_that_cannot_be_learned_are_refused(tmp_path, splits, message):
    for split, labels in splits.items():
        write_plain_parquet(tmp_path / f"{split}.parquet", labels)
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path), seed=0)


def test_splits_without_training_are_refused(tmp_path):
    DatasetDict(first=table([0, 1]), second=table([0, 1])).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"the splits \['first', 'second'\], expected 'train'"):
        load_images(str(tmp_path / "saved"), seed=0)


@pytest.mark.parametrize("kind", ["empty", "text", "absent"])
def test_folders_without_images_are_refused(tmp_path, kind):
    folder = tmp_path / "folder"
    if kind != "absent":
        folder.mkdir()
    if kind == "text":
        (folder / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="--data is .*could not be read as a data set of images"):
        load_images(str(folder), seed=0)


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="neither a folder nor a parquet file"):
        load_images(str(tmp_path / "notes.txt"), seed=0)


@pytest.fixture(scope="module")
def digits():
    return load_images(None, seed=0)


def test_digits_are_the_scans_of_scikit_learn(digits):
    data = digits
    assert data.classes == list("0123456789")
    assert [len(data.train), len(data.validation), len(data.test)] == [800, 200, 797]
    scans, labels = load_digits(return_X_y=True)
    counts = Counter(data.train.labels) + Counter(data.validation.labels) + Counter(data.test.labels)
    assert counts == Counter(labels.tolist())
    enlarged = torch.nn.functional.interpolate(
        torch.from_numpy(scans).reshape(-1, 1, 8, 8) / 16, size=32, mode="bilinear", align_corners=False
    )[:, 0]
    remaining = set(range(len(labels)))
    for split in (data.train, data.validation, data.test):
        images = [np.asarray(image) for image in split.images["image"]]
        assert {image.shape for image in images} == {(32, 32, 3)}
        grey = torch.from_numpy(np.stack(images)[..., 0]) / 255
        distances = torch.cdist(grey.flatten(1).double(), enlarged.flatten(1))
        nearest = distances.argmin(1)
        assert (grey - enlarged[nearest]).abs().max() <= 0.51 / 255
        assert labels[nearest].tolist() == split.labels
        assert len(set(nearest.tolist())) == len(split)
        remaining -= set(nearest.tolist())
    assert not remaining


def test_digits_are_split_alike_whatever_the_seed(digits):
    assert digits.test.labels == load_images(None, seed=1).test.labels
