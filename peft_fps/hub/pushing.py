"""Push adapters to the Hub together with their model card."""

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
    """Push adapters as `model.push_to_hub` does, with their model card.

    `model.push_to_hub` saves the card and then writes a general one over it. Here a card that the repository has
    already is brought up to date: what others wrote in it stays.

    Args:
        model: a `PeftModel`.
        repo_id: `"user/name"`; is made if need be.
        token: of a user who may write there; the one that is logged in if None.
        private: whether a repository that is made is private; as the user's settings say if None.
        revision: branch; `"main"` if None, made if need be.
        commit_message: title of the commit.
        create_pr: open a pull request instead.
        picture: add a picture of the selection to the card, if matplotlib is installed.
        options: arguments of `save_pretrained`, `selected_adapters` for instance.

    Returns:
        The commit; `commit.oid` is a `revision` to load.

    Raises:
        HfHubHTTPError: the Hub refuses; nothing was changed then but for a new repository or branch.
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
