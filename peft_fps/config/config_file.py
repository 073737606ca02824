"""A config on disk: reading it with a check of the adapter file beside it, and writing it with a record and a card."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig

from peft_fps.card import SavedAdapter, complete_card
from peft_fps.checkpoint import WEIGHTS, check_folder, is_pickled
from peft_fps.checkpoint.field_checks import check_choice
from peft_fps.checkpoint.record import AdapterRecord
from peft_fps.config.config_fields import CHOICES


class SavedConfig(PeftConfig):
    """The part of an `FPSConfig` that reads and writes files.

    Attributes:
        check_base: what to do about another base model, `"error"` or `"warn"`. The caller that loads chooses.
        record: what the file that the config came from records of its adapter. None for a new adapter.
        to_save: what a model hands over about its adapter just before it saves the config. None before.
        missing_weights: the folder that the config came from, if it holds no adapter file. Else None.
    """

    check_base: str
    record: AdapterRecord | None
    to_save: SavedAdapter | None
    missing_weights: str | None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load a config from a folder or the Hub, and check the adapter file beside it.

        So PEFT's loading calls refuse a pickled, unreadable or incomplete file before they touch a model.

        Args:
            pretrained_model_name_or_path: folder, or name on the Hub.
            subfolder: folder in it that holds the adapter.
            kwargs: `check_base`, and arguments of `hf_hub_download`.

        Raises:
            ValueError: there is no config, it is not valid, or the adapter file beside it is not.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, cls):  # PEFT returns the class that the file names, whichever was asked
            return config
        # whatever a file says, what to do about another base is the caller's choice
        config.check_base = kwargs.get("check_base", "error")
        check_choice("check_base", config.check_base, CHOICES["check_base"])
        downloads, _, _ = cls._split_kwargs(kwargs)
        folder = _adapter_folder(str(pretrained_model_name_or_path), subfolder, downloads)
        if folder is not None:
            config._check_file(folder)
        return config

    def _check_file(self, folder: Path) -> None:
        """Check the adapter file beside the config, and note a folder that lacks it."""
        record, present = self.record, is_pickled(folder) or (folder / WEIGHTS).exists()
        if record is not None:
            check_folder(folder, record.whole_tensors or (), record.pickled, record.tensors_sha256)
            self.missing_weights = None if present else str(folder)
        elif present:
            check_folder(folder, (), pickled=False)
            raise ValueError(
                f"{folder}: record is None beside the adapter's tensors, expected the record of their sizes that "
                "saving writes. The config is incomplete; fetch or save the adapter again."
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config to a folder in which PEFT has just written the adapter's tensors. Complete its card.

        Args:
            save_directory: the folder.
            kwargs: as PEFT passes them.
        """
        folder, given = Path(save_directory), self.to_save
        if self.record_to_save is not None:
            record = replace(self.record_to_save, pickled=is_pickled(folder))
            self.to_save = SavedAdapter(record) if given is None else replace(given, record=record)
        super().save_pretrained(save_directory, **kwargs)
        # PeftModel.save_pretrained passes a mapping; other callers may yet write the tensors
        if "auto_mapping_dict" in kwargs and self.to_save is not None:
            settings: Any = self  # an `FPSConfig` has the fields that the card reads
            complete_card(folder, settings, self.to_save, kwargs["auto_mapping_dict"])

    def check_complete(self) -> None:
        """Raise ValueError if the config came from a folder without an adapter file."""
        if self.missing_weights is not None:
            raise ValueError(
                f"{self.missing_weights} holds a config and no {WEIGHTS}, expected both to load an adapter. Save or "
                "fetch the adapter again, or start from an FPSConfig without a record. Nothing was changed."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain data in a fixed order, without `check_base`, which the loading side chooses."""
        data = super().to_dict()
        del data["check_base"]
        record = self.record_to_save
        data["record"] = None if record is None else record.to_json()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in data.items()}

    @property
    def trainable_token_indices(self) -> dict[str, list[int]] | None:
        """An empty dict while the adapter is saved, else None.

        PEFT saves the whole weight of a targeted `embed_tokens` or `lm_head`, unless it finds a dict here.
        """
        return None if self.to_save is None else {}

    @property
    def record_to_save(self) -> AdapterRecord | None:
        """The record that saving writes: the one that a model has handed over, else the one that the config has."""
        return self.record if self.to_save is None else self.to_save.record


def _adapter_folder(path: str, subfolder: str | None, downloads: dict[str, Any]) -> Path | None:
    """Return the local folder of an adapter, downloaded if it is on the Hub; None if there it has no adapter file.

    Args:
        path: a folder, or a name on the Hub.
        subfolder: folder in it that holds the adapter.
        downloads: arguments of `hf_hub_download`.
    """
    folder = Path(path) / (subfolder or "")
    if folder.is_dir():
        return folder
    try:  # the loading call that follows finds it in the cache
        return Path(hf_hub_download(path, WEIGHTS, subfolder=subfolder, **downloads)).parent
    except EntryNotFoundError:  # LocalEntryNotFoundError, offline, is one of them
        return None
