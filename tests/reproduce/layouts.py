"""Small folders in the layouts of VTAB-1k and FGVC."""

import json
from pathlib import Path

from tests.vision.conftest import picture


def write_vtab(folder: Path, train: int = 12, validation: int = 6, test: int = 8, classes: int = 2) -> Path:
    """Images of bright red (label 0), green and so on, in turn."""
    lines = {}
    start = 0
    for split, count in {"train800": train, "val200": validation, "test": test}.items():
        (folder / "images" / split).mkdir(parents=True)
        names = [f"images/{split}/{number:03}.png" for number in range(count)]
        for number, name in enumerate(names):
            picture(number % classes, start + number).save(folder / name)
        lines[split] = [f"{name} {number % classes}" for number, name in enumerate(names)]
        start += count
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for name, content in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
    return folder


def write_fgvc(folder: Path, train: int = 12, validation: int = 6, test: int = 8, ids: tuple = (3, 7)) -> Path:
    """As `write_vtab`; class ids are those given, images stand in `images/`."""
    start = 0
    for split, count in {"train": train, "val": validation, "test": test}.items():
        (folder / "images" / split).mkdir(parents=True)
        content = {}
        for number in range(count):
            name = f"{split}/{number:03}.png"
            picture(number % len(ids), start + number).save(folder / "images" / name)
            content[name] = ids[number % len(ids)]
        (folder / f"{split}.json").write_text(json.dumps(content))
        start += count
    return folder
