"""The installed client of the Hub, unchanged, with a Hub on loopback: push, load, revisions, tokens, cache, cards."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.hub.processes import Client
from tests.hub.server import Hub
from tests.hub.state import State
from tests.support.helpers import ROOT


ALICE, BOB = "hf_alice", "hf_bob"
WEIGHTS = "adapter_model.safetensors"

LOADS: dict[str, dict[str, Any]] = {
    "second": {"name": "alice/digits"},
    "tag": {"name": "alice/digits", "revision": "v1"},
    "branch": {"name": "alice/digits", "revision": "trial"},
    "trained": {"name": "alice/trained"},
    "anonymous": {"name": "alice/secret"},
    "wrong user": {"name": "alice/secret", "token": BOB},
    "wrong token": {"name": "alice/secret", "token": "hf_guess"},
    "secret": {"name": "alice/secret", "token": ALICE},
    "cats": {"name": "alice/secret", "subfolder": "cats", "token": ALICE},
    "damaged": {"name": "alice/damaged"},
    "absent": {"name": "alice/gone"},
    "other revision": {"name": "alice/digits", "revision": "v2"},
}


@dataclass
class Story:
    """What the processes wrote down, and what the Hub they spoke to holds."""

    state: State
    asked_offline: list[str]
    author: dict[str, Any]
    expected: dict[str, torch.Tensor]
    online: dict[str, Any]
    offline: dict[str, Any]
    predictions: dict[str, Any]

    def card(self, name: str, path: str = "README.md", revision: str = "main") -> tuple[dict[str, Any], str]:
        _, metadata, text = self.state.content(name, path, revision).decode().split("---\n", 2)
        return yaml.safe_load(metadata), text


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub({ALICE: "alice", BOB: "bob"})
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(hub, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture(scope="module")
def story(hub: Hub, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("notes")
    client.run("author", str(folder), HF_TOKEN=ALICE)
    shutil.rmtree(client.home)  # the reader sits at another machine
    author = json.loads((folder / "author.json").read_text())
    content = bytearray(hub.state.content("alice/damaged", WEIGHTS))
    content[-1] ^= 1
    hub.state.replace("alice/damaged", WEIGHTS, bytes(content))
    first = {"first": {"name": "alice/digits", "revision": author["commits"]["first"]}}
    client.run("reader", str(folder), "online", LOADS | first)
    known = ("second", "tag", "branch", "trained", "secret", "other revision")
    cached = {key: {k: v for k, v in LOADS[key].items() if k != "token"} for key in known}
    before = len(hub.state.requests)
    client.run("reader", str(folder), "offline", cached | first, offline=True)
    return Story(
        hub.state,
        hub.state.requests[before:],
        author,
        torch.load(folder / "expected.pt"),
        torch.load(folder / "online.pt"),
        torch.load(folder / "offline.pt"),
        {name: json.loads((folder / f"{name}.json").read_text()) for name in ("online", "offline")},
    )


PUSHED = {
    "first": "first",
    "tag": "first",
    **{name: name for name in ("second", "branch", "secret", "trained", "merged")},
}


@pytest.mark.parametrize("where", ["online", "offline"])
@pytest.mark.parametrize("load", PUSHED)
def test_what_was_pushed_computes_the_same_in_another_process(story: Story, load: str, where: str) -> None:
    """Offline the server is asked nothing, and the files come from the cache."""
    found = getattr(story, where)[load]
    assert isinstance(found, torch.Tensor), found
    torch.testing.assert_close(found, story.expected[PUSHED[load]], rtol=1e-5, atol=1e-5)
    assert story.asked_offline == []


def test_an_adapter_in_a_folder_of_its_own_loads_by_subfolder(story: Story) -> None:
    """Online: without network PEFT looks for the subfolder within itself."""
    torch.testing.assert_close(story.online["cats"], story.expected["cats"], rtol=1e-5, atol=1e-5)


def test_the_pushed_adapters_differ(story: Story) -> None:
    names = ["first", "second", "branch", "secret", "cats", "trained"]
    for number, name in enumerate(names):
        for other in names[:number]:
            assert not torch.allclose(story.expected[name], story.expected[other], atol=1e-3), (name, other)
    assert torch.allclose(story.expected["merged"], story.expected["branch"], atol=1e-4)


def test_every_push_is_a_commit(story: Story) -> None:
    repository, commits = story.state.repositories["alice/digits"], story.author["commits"]
    assert list(repository.commits)[1:] == [commits["first"], commits["second"], commits["branch"]]
    assert repository.branches == {"main": commits["second"], "trial": commits["branch"]}
    assert repository.tags == {"v1": commits["first"]}
    assert repository.commits[commits["first"]][WEIGHTS].sha256  # large files are in the storage


def test_a_private_repository_needs_its_token(story: Story) -> None:
    assert story.state.repositories["alice/secret"].private
    assert not story.state.repositories["alice/digits"].private
    for load, status in (("anonymous", 401), ("wrong user", 404)):
        assert "RepositoryNotFoundError" in story.online[load]
        assert f"{status} Client Error" in story.online[load]
    assert "401 Unauthorized" in story.online["wrong token"]


def test_no_token_reaches_the_storage(story: Story) -> None:
    assert story.state.leaked == []
    assert any(line.startswith("PUT /") for line in story.state.requests)


def test_the_client_asks_nothing_that_the_server_does_not_know(story: Story) -> None:
    assert story.state.unknown == []


def test_a_damaged_file_is_refused_by_our_checks(story: Story) -> None:
    assert story.online["damaged"].startswith("ValueError(")
    assert "holds tensors with the digest" in story.online["damaged"]
    assert "fetch or save the adapter again" in story.online["damaged"]


def test_what_is_not_there_is_told_so(story: Story) -> None:
    assert "RepositoryNotFoundError" in story.online["absent"]
    assert "RevisionNotFoundError" in story.online["other revision"]
    assert "LocalEntryNotFoundError" in story.offline["other revision"]


def test_pipelines_predict_alike_with_an_adapter_and_merged(story: Story) -> None:
    for found in story.predictions.values():
        expected = found.pop("adapter")
        assert len(expected) == 3
        assert all(len(guesses) == 10 for guesses in expected)
        assert set(found) == {"load_adapter", "merged", "merged by name"}
        for name, guesses in found.items():
            for mine, others in zip(expected, guesses, strict=True):
                assert [label for label, _ in mine] == [label for label, _ in others], name
                scores = ([score for _, score in pairs] for pairs in (mine, others))
                torch.testing.assert_close(*map(torch.tensor, scores), rtol=1e-4, atol=1e-6)


def test_push_adapter_pushes_the_card(story: Story) -> None:
    metadata, text = story.card("alice/digits")
    assert {"peft", "peft_fps"} <= set(metadata["tags"])
    assert metadata["library_name"] == "peft"
    assert text.count("## FPS adapter") == 1
    assert 'PeftModel.from_pretrained(model, "alice/digits")' in text
    assert "](selection.png)" in text
    assert story.state.content("alice/digits", "selection.png").startswith(b"\x89PNG")
    folded = story.card("alice/secret", "cats/README.md")[1]
    assert folded.count("## FPS adapter") == 1
    assert 'model, "alice/secret", subfolder="cats")' in folded


def test_push_adapter_keeps_what_the_card_said(story: Story) -> None:
    """`model.push_to_hub` before it has put transformers' general card there."""
    before = story.card("alice/digits", revision=story.author["commits"]["first"])[1]
    assert "## FPS adapter" not in before
    general = "This is the model card of a"
    assert general in before
    assert general in story.card("alice/digits")[1]


def test_a_push_of_the_trainer_has_our_part_and_its_results(story: Story) -> None:
    metadata, text = story.card("alice/trained")
    assert text.count("## FPS adapter") == 1
    assert 'PeftModel.from_pretrained(model, "alice/trained")' in text
    assert "### Training hyperparameters" in text  # the Trainer's own
    assert "over 8 examples" in text
    [result] = metadata["model-index"][0]["results"]
    [measured] = story.author["measured"]
    assert result["task"]["type"] == "image-classification"
    assert {metric["name"]: metric["value"] for metric in result["metrics"]} == {
        f"{name} after 2 training steps": measured[f"eval_{name}"] for name in ("accuracy", "loss")
    }
    assert (
        len(story.state.repositories["alice/trained"].commits) >= 3
    )  # the first, one during training, one at its end


def test_the_notebook_on_publishing_runs(hub: Hub, client: Client, tmp_path: Path) -> None:
    notebook = ROOT / "notebooks" / "publishing_and_merging.ipynb"
    printed = client.run("notebook", str(notebook), str(tmp_path), HF_TOKEN=BOB)
    assert "same logits: True" in printed
    assert float(printed.split("largest difference of a logit: ")[1].split()[0]) < 1e-4
    assert "import peft_fps" in printed  # in the card
    assert "'score'" in printed
    assert not [name for name in hub.state.repositories if name.startswith("bob/")]
