"""What a Hub holds: repositories with branches, tags and commits, users with tokens, and a storage for large files."""

import hashlib
import json
from dataclasses import dataclass, field


class Refused(Exception):
    """An answer other than success, with the headers by which the client tells one error from another."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass(frozen=True)
class File:
    """A file of a commit: its content, or its place in the storage; `oid` is what git calls it."""

    size: int
    oid: str
    content: bytes | None = None
    sha256: str | None = None

    @classmethod
    def regular(cls, content: bytes) -> "File":
        return cls(len(content), git_oid(content), content)

    @classmethod
    def large(cls, sha256: str, size: int) -> "File":
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return cls(size, git_oid(pointer.encode()), sha256=sha256)


@dataclass
class Repository:
    """Commits by id, each a whole tree, and the branches and tags that name them."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File], title: str) -> str:
        tree = [(path, file.oid) for path, file in sorted(files.items())]
        oid = hashlib.sha1(json.dumps([self.branches.get(branch), title, tree]).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid


@dataclass
class State:
    """All of a Hub but its addresses.

    Attributes:
        users: name by token.
        repositories: by `user/name`.
        storage: content of large files by its SHA-256.
        requests: every request, as method and path.
        leaked: requests to the storage that carried a token.
        unknown: requests that the server does not know.
    """

    users: dict[str, str]
    repositories: dict[str, Repository] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def readable(self, name: str, user: str | None) -> Repository:
        """A repository; one that does not exist and one that is hidden look the same."""
        repository = self.repositories.get(name)
        if repository is None or (repository.private and user != name.split("/")[0]):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, name: str, user: str | None) -> Repository:
        repository = self.readable(name, user)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user != name.split("/")[0]:
            raise Refused(403, "You don't have the rights to write to this repository")
        return repository

    def tree(self, name: str, revision: str, user: str | None) -> tuple[str, dict[str, File]]:
        """A commit and its files, by branch, tag or commit id."""
        repository = self.readable(name, user)
        oid = repository.branches.get(revision) or repository.tags.get(revision) or revision
        if oid not in repository.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.commits[oid]

    def content(self, name: str, path: str, revision: str = "main") -> bytes:
        """A file's content, whoever asks."""
        file = self.tree(name, revision, name.split("/")[0])[1][path]
        return self.storage[file.sha256] if file.sha256 else file.content or b""

    def replace(self, name: str, path: str, content: bytes) -> None:
        """Commit another content of a large file."""
        repository = self.repositories[name]
        sha256 = hashlib.sha256(content).hexdigest()
        self.storage[sha256] = content
        files = repository.commits[repository.branches["main"]] | {path: File.large(sha256, len(content))}
        repository.commit("main", files, f"Update {path}")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
