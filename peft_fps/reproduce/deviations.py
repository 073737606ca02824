"""What a reproduction does otherwise than the papers' code, or where the sources leave something open."""

from peft_fps.reproduce.recipes import Task


ALL = (
    "The papers pick the epoch on the test set. Here the best epoch on the validation images is kept and the test "
    "images are read once; with --train-on-all the last epoch is kept.",
    "The papers train on training and validation images together. Here validation images only choose the epoch; "
    "--train-on-all trains on both.",
    "The published scripts run 110 epochs, the last 10 at a learning rate of 1e-8. Here 100.",
    "The learning rate rises from 0 and falls to 0, at every step; in the scripts from 1e-7 and to 1e-8, at every "
    "epoch.",
    "GPS's scripts were rewritten after their first upload, with other learning rates; these are the rewritten ones. "
    "FPS prints no values per task and takes GPS's.",
)
"""What holds for every task and method."""

FPS = (
    "FPS does not say whether it selects on augmented images. Here on the images as they are evaluated, in evaluation "
    "mode."
)

GPS = (
    "GPS selects under float16. Here in float32; its two views are cut from the resized image, and the last "
    "incomplete batch counts."
)

OTHER = (
    "The training is that of GPS's scripts, not that of the method's own paper; so is K where the method has one per "
    "neuron and prints none for these tasks."
)

FGVC = (
    "GPS reports the better of raw and averaged weights (EMA) without saying which. Here both compete on the "
    "validation images. With --train-on-all nothing can choose, and there is no averaging.",
    "The printed 0.77 % of trained parameters does not follow from the K of the published scripts (1.07 % with "
    "biases and head).",
)


def deviations(task: Task, method: str) -> list[str]:
    """Return what differs for a task and a method, one sentence or two each."""
    of_method = {"fps": FPS, "gps": GPS}.get(method, OTHER)
    return [*ALL, of_method, *(FGVC if task.benchmark == "fgvc" else ())]
