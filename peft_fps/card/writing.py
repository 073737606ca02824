"""Write our part into the model card of a saved adapter.

PEFT writes a card when it begins to save. Our part is added when adapter and config are on disk; so a card that cannot
be written, or a process that is killed over it, never spoils an adapter. Nothing reads the card on loading.
"""

import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel, __version__

from peft_fps.card.evaluation import eval_results, is_measured
from peft_fps.card.facts import Facts, read_facts
from peft_fps.card.markdown import BEGIN, END, put, render
from peft_fps.checkpoint.folder import PICKLED_WEIGHTS, WEIGHTS
from peft_fps.config import FPSConfig
from peft_fps.selections import Selection


CARD, PICTURE = "README.md", "selection.png"
TAGS = ("peft", "peft_fps")


def write_card(
    model: PeftModel, folder: str | os.PathLike[str], *, location: str | None = None, picture: bool = True
) -> None:
    """Write the cards of a model's adapters anew where `save_pretrained` has saved them, with a picture.

    `save_pretrained` writes all of it but for the picture, which takes longer than the saving.

    Args:
        model: that was saved.
        folder: where it was saved. An adapter that is not named `"default"` has a card in its own folder within.
        location: what the card tells to load the adapter from, the name of a repository for instance.
        picture: draw the selection, as `selection.png` beside the card; only if matplotlib is installed.
    """
    for name, config in model.peft_config.items():
        own = Path(folder) / ("" if name == "default" else name)
        if not isinstance(config, FPSConfig) or not any((own / file).exists() for file in (WEIGHTS, PICKLED_WEIGHTS)):
            continue
        told: dict[str, str] = {}
        if location is not None:
            told = {"location": location} if name == "default" else {"location": location, "subfolder": name}
        if picture and draw_picture(own):
            told["picture"] = PICTURE
        base = type(model.get_base_model())
        named = {"base_model_class": base.__name__, "parent_library": base.__module__}
        complete_card(own, config, named, **told)


def complete_card(folder: Path, config: FPSConfig, base: Mapping[str, str] | None, **more: Any) -> None:
    """Write our part into the card beside an adapter, which is made if there is none; warns if that cannot be done.

    Args:
        folder: with adapter and config.
        config: as it was saved.
        base: class of the base model, see `read_facts`.
        more: further facts, see `read_facts`.
    """
    path = folder / CARD
    try:
        facts = read_facts(folder, config, base, **more)
        card = ModelCard.load(path) if path.exists() else new_card()
        shown = f"({PICTURE})" in card.text.partition(BEGIN)[2].partition(END)[0]
        update(card, facts)
    except (TypeError, ValueError, yaml.YAMLError) as error:  # of metadata that somebody wrote by hand
        warnings.warn(f"{path} was not completed, the adapter itself is saved: {error}", stacklevel=3)
        return
    if shown and facts.picture is None:
        (folder / PICTURE).unlink(missing_ok=True)  # ours, and of an older selection
    written = folder / f".{CARD}.saving"
    card.save(written)
    os.replace(written, path)


def update(card: ModelCard, facts: Facts) -> None:
    """Put our part into a card, text and metadata; once more changes nothing."""
    data: Any = card.data
    data.library_name = "peft"
    data.tags = sorted({*(data.tags or ()), *TAGS})
    data.base_model = facts.base_model if data.base_model is None else data.base_model
    held = data.eval_results or []
    results = [result for result in held if not is_measured(result)] + eval_results(facts.evaluation, facts.task)
    if results:
        base = (facts.base_model or "").rstrip("/").rpartition("/")[2]
        data.model_name = data.model_name or (f"{base}-fps" if base else "fps-adapter")
        data.eval_results = results
    elif held:  # all of them were ours, of values that are no longer
        data.model_name = data.eval_results = None
    card.text = put(card.text, render(facts))


def new_card() -> ModelCard:
    """Return a card with nothing of ours, for an adapter in a folder of its own, where PEFT writes none."""
    data = ModelCardData(library_name="peft").to_yaml()
    return ModelCard(
        f"---\n{data}\n---\n\n# Model card of an adapter\n\n### Framework versions\n\n- PEFT {__version__}"
    )


def draw_picture(folder: Path) -> bool:
    """Draw the selection of a saved adapter beside it; False without matplotlib, or if there is nothing to draw."""
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


def keep_card(model: PeftModel, location: str | None = None) -> None:
    """Let whoever asks this model for PEFT's card get our part as well.

    For the Trainer: before it uploads, it writes a card of its own over the one that was saved, and then calls
    `model.create_or_update_model_card`. There is no event to add to it.

    Args:
        model: gets that method of its own.
        location: see `write_card`.
    """
    vars(model)["create_or_update_model_card"] = partial(_create_or_update, model, location)


def _create_or_update(model: PeftModel, location: str | None, output_dir: str) -> None:
    type(model).create_or_update_model_card(model, output_dir)
    write_card(model, output_dir, location=location, picture=False)
