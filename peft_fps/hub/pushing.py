"""Push adapters to the Hub together with their model cards."""

import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from peft import PeftModel

from peft_fps.card.writing import CARD
from peft_fps.hub.picture_card import write_card


def push_adapter(
    model: PeftModel,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
    picture: bool = True,
    **options: Any,
) -> CommitInfo:
    """Push the adapters of a model to the Hub, together with their model cards.

    `model.push_to_hub` saves our card and then overwrites it by a general one. This function updates the card of the
    repository and keeps the text that others wrote in it.

    Args:
        model: model with the adapters.
        repo_id: name of the repository, `"user/name"`. The function creates it if it does not exist.
        token: token of a user who may write to the repository. Default: the user who is logged in.
        private: whether a new repository is private. Default: as the user's settings say.
        revision: branch to push to. The function creates it if it does not exist. Default: `"main"`.
        commit_message: title of the commit. Default: `"Upload adapter"`.
        create_pr: open a pull request instead. Default: False.
        picture: add a picture of the selection to the card, if matplotlib is installed. Default: True.
        options: arguments of `save_pretrained`, such as `selected_adapters`.

    Returns:
        The commit. Its `oid` is a `revision` to load.

    Raises:
        HfHubHTTPError: the Hub refuses the push. Then there is at most a new empty repository or a new branch.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as folder:
        for name in options.get("selected_adapters") or model.peft_config:
            card = CARD if name == "default" else f"{name}/{CARD}"
            with suppress(EntryNotFoundError, RevisionNotFoundError):
                present = api.hf_hub_download(repo_id, card, revision=revision)
                (Path(folder) / card).parent.mkdir(exist_ok=True)
                shutil.copyfile(present, Path(folder) / card)
        model.save_pretrained(folder, **options)
        write_card(model, folder, location=repo_id, picture=picture)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
