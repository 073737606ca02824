"""How GPS trains each of its 24 tasks, which FPS takes over: plain data."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """A task of a benchmark as GPS's scripts train it.

    Attributes:
        name: as in the scripts.
        benchmark: `"vtab-1k"` or `"fgvc"`.
        classes: number of classes.
        per_neuron: selected weights per output neuron, K.
        batch_size: images per step.
        learning_rate: peak, of selected weights, biases and head alike.
        drop_path: rate in the last block; it grows linearly from 0 in the first.
        ema: decay of the running average of the weights, None without one.
        published: test accuracies that the papers print, in percent, by preset.
        folders: further names that the task's folder goes by.
    """

    name: str
    benchmark: str
    classes: int
    per_neuron: int
    batch_size: int
    learning_rate: float
    drop_path: float
    ema: float | None
    published: dict[str, float]
    folders: tuple[str, ...] = ()


BENCHMARKS = {"vtab-1k": "VTAB-1k", "fgvc": "FGVC"}
"""The benchmarks, as commands and as they are written."""

MODEL = "timm/vit_base_patch16_224.augreg_in21k"
"""ViT-B/16 trained on ImageNet-21k with AugReg, from which GPS starts."""

NEURONS, WIDTH = 83_712, 768
"""Output neurons of all linear and convolutional layers of a ViT-B/16 (one bias each), and the head's inputs."""

COMMON: dict[str, Any] = {
    "model": MODEL,
    "image_size": 224,
    "epochs": 100,
    "warm_up": 0.1,
    "precision": "fp16",
    "seed": 42,
}
"""Settings of all tasks. Besides: Adam, no weight decay, no clipping, a cosine; normalised with 0.5 and 0.5."""

NORMALISATION = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
MIXUP, CUTMIX, SMOOTHING = 0.8, 1.0, 0.1
CROP_SHARE = 0.9
VTAB_IMAGES = {False: 800, True: 1000}
"""Training images of a VTAB-1k task: those of `train800.txt`, or with the validation images."""

_COLUMNS = ("name", "classes", "per_neuron", "batch_size", "learning_rate", "drop_path", "ema")

_ROWS: dict[str, list[Any]] = {
    # as _COLUMNS, then the printed accuracies of GPS and of FPS, then further names of the folder
    "fgvc": [
        ("cub", 200, 2, 32, 3e-3, 0.0, 0.9998, 89.9, 89.5, ("CUB_200_2011",)),
        ("nabirds", 555, 20, 32, 1e-4, 0.1, 0.9998, 86.7, 86.9, ("NABirds",)),
        ("flowers", 102, 1, 32, 1e-3, 0.1, 0.99, 99.7, 99.7, ("OxfordFlower", "OxfordFlowers", "oxfordflowers")),
        ("cars", 196, 15, 32, 5e-4, 0.0, 0.9998, 90.4, 91.3, ("StanfordCars", "Stanford-cars", "stanfordcars")),
        ("dogs", 120, 1, 64, 1e-4, 0.0, 0.9998, 92.2, 88.9, ("StanfordDogs", "Stanford-dogs", "stanforddogs")),
    ],
    "vtab-1k": [
        ("caltech101", 102, 1, 16, 2e-3, 0.0, None, 94.2, 93.2, ()),
        ("cifar100", 100, 1, 32, 1e-2, 0.0, None, 81.1, 76.8, ("cifar", "cifar_100")),
        ("clevr_count", 8, 1, 16, 3e-4, 0.1, None, 79.9, 75.3, ()),
        ("clevr_dist", 6, 1, 16, 2e-3, 0.1, None, 62.6, 61.9, ()),
        ("diabetic_retinopathy", 5, 1, 32, 2e-3, 0.2, None, 76.5, 76.0, ()),
        ("dmlab", 6, 1, 16, 1.5e-3, 0.1, None, 55.0, 54.8, ()),
        ("dsprites_loc", 16, 1, 32, 7e-3, 0.0, None, 84.0, 79.5, ()),
        ("dsprites_ori", 16, 1, 16, 5e-4, 0.2, None, 55.4, 54.7, ()),
        ("dtd", 47, 1, 16, 2e-3, 0.0, None, 75.8, 75.4, ()),
        ("eurosat", 10, 1, 16, 2e-3, 0.0, None, 96.2, 95.5, ()),
        ("flowers102", 102, 1, 16, 2e-3, 0.0, None, 99.4, 99.4, ("oxford_flowers102",)),
        ("kitti", 4, 1, 16, 1e-3, 0.0, None, 82.4, 82.7, ()),
        ("patch_camelyon", 2, 2, 32, 4e-3, 0.0, None, 87.9, 86.9, ()),
        ("pets", 37, 1, 32, 3e-3, 0.0, None, 91.7, 91.6, ("oxford_iiit_pet",)),
        ("resisc45", 45, 1, 16, 1.5e-3, 0.1, None, 86.5, 88.1, ()),
        ("smallnorb_azi", 18, 1, 32, 3e-3, 0.1, None, 29.7, 31.6, ()),
        ("smallnorb_ele", 9, 1, 32, 3e-4, 0.2, None, 46.1, 46.5, ()),
        ("sun397", 397, 1, 16, 2.5e-3, 0.0, None, 52.4, 51.5, ()),
        ("svhn", 10, 1, 32, 5e-3, 0.0, None, 91.6, 89.0, ()),
    ],
}

TASKS: dict[str, dict[str, Task]] = {
    benchmark: {
        row[0]: Task(
            **dict(zip(_COLUMNS, row[:7], strict=True)),
            benchmark=benchmark,
            published={"gps": row[7], "fps": row[8]},
            folders=row[9],
        )
        for row in rows
    }
    for benchmark, rows in _ROWS.items()
}
"""The tasks by benchmark and name."""


def find_task(benchmark: str, name: str) -> Task:
    """Return a task.

    Raises:
        ValueError: the benchmark has no such task; lists those that it has.
    """
    tasks = TASKS[benchmark]
    if name not in tasks:
        raise ValueError(f"{name!r} is no task of {BENCHMARKS[benchmark]}, expected one of {', '.join(tasks)}.")
    return tasks[name]


def published_settings(task: Task) -> dict[str, Any]:
    """Return the published value of everything that an option can replace."""
    own = {name: getattr(task, name) for name in ("per_neuron", "batch_size", "learning_rate", "drop_path", "ema")}
    return COMMON | own | {"augmentation": task.benchmark == "fgvc"}


def training_images(task: Task, train_on_all: bool) -> int | None:
    """Return the number of training images that the benchmark has; None where the task's own files decide."""
    return VTAB_IMAGES[train_on_all] if task.benchmark == "vtab-1k" else None


def trained_parameters(task: Task) -> int:
    """Return how many parameters of a ViT-B/16 the recipe trains: weights, biases and head."""
    return NEURONS * task.per_neuron + NEURONS + (WIDTH + 1) * task.classes


def recipe_table() -> str:
    """Return the recipes of all tasks as a Markdown table."""
    header = "| task | classes | K | batch | learning rate | drop-path | EMA | trained | GPS, FPS printed (%) |\n"
    lines = [header, "|---|---|---|---|---|---|---|---|---|\n"]
    for task in (task for tasks in TASKS.values() for task in tasks.values()):
        cells = (
            *(f"{BENCHMARKS[task.benchmark]} `{task.name}`", task.classes, task.per_neuron, task.batch_size),
            *(f"{task.learning_rate:g}", f"{task.drop_path:g}", task.ema or "–", f"{trained_parameters(task):,}"),
            f"{task.published['gps']}, {task.published['fps']}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |\n")
    return "".join(lines)
