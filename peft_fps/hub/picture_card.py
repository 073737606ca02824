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
    """Write the cards of a model's adapters anew, with a picture of the selection.

    `save_pretrained` writes the same cards without the picture, because drawing takes longer than saving.

    Args:
        model: the model that was saved.
        folder: where `save_pretrained` has saved it. Each adapter that is not named `"default"` has a card of its own
            in a folder of its own.
        location: where the card says to load the adapter from, the name of a repository for instance.
        picture: draw the selection as `selection.png` beside the card, if matplotlib is installed.
    """
    folders = adapter_folders(model, folder) if picture else {}
    pictured = [name for name, path in folders.items() if draw_picture(path)]
    write_cards(model, folder, location=location, pictured=pictured)


def draw_picture(folder: Path) -> bool:
    """Draw the selection of a saved adapter as `selection.png` beside it.

    Returns:
        Whether there is a picture. There is none without matplotlib, of a pickled adapter, or of biases alone.
    """
    try:
        from peft_fps.plots import plot_selection
    except ImportError:
        return False
    try:
        figure = plot_selection(Selection.from_adapter(folder))
    except ValueError:  # pickled, or biases alone
        return False
    figure.savefig(folder / PICTURE)
    return True
