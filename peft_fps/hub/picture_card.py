"""Model cards with a picture of the selection."""

import os
from pathlib import Path

from peft import PeftModel

from peft_fps.card import adapter_folders, write_cards
from peft_fps.card.writing import PICTURE
from peft_fps.saved_selection import Selection


def write_card(
    model: PeftModel, folder: str | os.PathLike[str], *, location: str | None = None, picture: bool = True
) -> None:
    """Write the cards of a model's adapters again, with a picture of the selection.

    `save_pretrained` writes the same cards without the picture, because drawing takes longer than saving.

    Args:
        model: the model that was saved.
        folder: folder that `save_pretrained` has saved it to. An adapter that is not named `"default"` has its card in
            a subfolder.
        location: where the card says to load the adapter from, such as the name of a repository. Default: a
            placeholder.
        picture: draw the selection as `selection.png` beside the card, if matplotlib is installed. Default: True.
    """
    folders = adapter_folders(model, folder) if picture else {}
    pictured = [name for name, path in folders.items() if draw_picture(path)]
    write_cards(model, folder, location=location, pictured=pictured)


def draw_picture(folder: Path) -> bool:
    """Draw the selection of a saved adapter as `selection.png` in its folder.

    Args:
        folder: folder of the adapter.

    Returns:
        Whether there is a picture. There is none without matplotlib, for a pickled adapter, or for an adapter of only
        biases.
    """
    try:
        from peft_fps.plots import plot_selection
    except ImportError:
        return False
    try:
        figure = plot_selection(Selection.from_adapter(folder))
    except ValueError:  # the adapter is pickled, or has only biases
        return False
    figure.savefig(folder / PICTURE)
    return True
