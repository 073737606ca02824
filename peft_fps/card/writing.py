"""Write our part into the model card of a saved adapter.

PEFT writes a card when it begins to save. Our part follows when adapter and config are on disk. So a card that cannot
be written, or a process that is killed over it, never spoils an adapter. Loading does not read the card.
"""

import os
import warnings
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel, __version__

from peft_fps.card.evaluation import eval_results, is_measured
from peft_fps.card.facts import CardSettings, Facts, SavedAdapter, read_facts
from peft_fps.card.markdown import BEGIN, END, put, render
from peft_fps.checkpoint.folder import PICKLED_WEIGHTS, WEIGHTS
from peft_fps.checkpoint.record import read_record
from peft_fps.layers.lookup import adapter_state, target_layers
from peft_fps.registration import fps_type


CARD, PICTURE = "README.md", "selection.png"
TAGS = ("peft", "peft_fps")


def adapter_folders(model: PeftModel, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Return the folders of the model's FPS adapters, by name, where `save_pretrained(folder)` has saved them."""
    found = {}
    for name, config in model.peft_config.items():
        path = Path(folder) / ("" if name == "default" else name)
        if config.peft_type == fps_type() and any((path / file).exists() for file in (WEIGHTS, PICKLED_WEIGHTS)):
            found[name] = path
    return found


def write_cards(
    model: PeftModel,
    folder: str | os.PathLike[str],
    *,
    location: str | None = None,
    pictured: Collection[str] = (),
) -> None:
    """Write our part into the cards of a model's adapters anew.

    Args:
        model: the model that was saved.
        folder: where `save_pretrained` has saved it. Each adapter that is not named `"default"` has a card of its own
            in a folder of its own.
        location: where the card says to load the adapter from, the name of a repository for instance.
        pictured: names of the adapters that have the picture `selection.png` beside their card.
    """
    base = type(model.get_base_model())
    named = {"base_model_class": base.__name__, "parent_library": base.__module__}
    for name, path in adapter_folders(model, folder).items():
        config: Any = model.peft_config[name]
        record = read_record(path)
        if record is None:
            continue
        state = adapter_state(target_layers(model, name), name)
        saved = SavedAdapter(record, state.base_parameters, state.evaluation)
        told: dict[str, str] = {}
        if location is not None:
            told = {"location": location} if name == "default" else {"location": location, "subfolder": name}
        if name in pictured:
            told["picture"] = PICTURE
        complete_card(path, config, saved, named, **told)


def complete_card(
    folder: Path, config: CardSettings, saved: SavedAdapter, base: Mapping[str, str] | None, **more: Any
) -> None:
    """Write our part into the card beside an adapter, and make the card if there is none. Warn if that fails.

    Args:
        folder: folder with adapter and config.
        config: what the user asked for.
        saved: what was saved.
        base: class of the base model, see `read_facts`.
        more: further facts, see `read_facts`.
    """
    path = folder / CARD
    try:
        facts = read_facts(folder, config, saved, base, **more)
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
    """Put our part into a card, text and metadata. Doing so again changes nothing."""
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
    """Return a card without our part, for an adapter in a folder of its own, where PEFT writes no card."""
    data = ModelCardData(library_name="peft").to_yaml()
    return ModelCard(
        f"---\n{data}\n---\n\n# Model card of an adapter\n\n### Framework versions\n\n- PEFT {__version__}"
    )


def keep_card(model: PeftModel, location: str | None = None) -> None:
    """Let every caller that asks this model for PEFT's card get our part as well.

    The Trainer needs it: before it uploads, it writes a card of its own over the one that was saved, and then calls
    `model.create_or_update_model_card`. There is no event between the two.

    Args:
        model: the model, which gets this method as an attribute of its own.
        location: see `write_cards`.
    """
    vars(model)["create_or_update_model_card"] = partial(_create_or_update, model, location)


def _create_or_update(model: PeftModel, location: str | None, output_dir: str) -> None:
    """Write the card as PEFT does, and our part into it."""
    type(model).create_or_update_model_card(model, output_dir)
    write_cards(model, output_dir, location=location)
