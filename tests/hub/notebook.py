"""Execute a notebook in a folder: python -m tests.hub.notebook NOTEBOOK FOLDER OUTPUT."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


path, folder, output = sys.argv[1:]
notebook = nbformat.read(path, as_version=4)
NotebookClient(notebook, timeout=240, resources={"metadata": {"path": folder}}).execute()
Path(output).write_text(nbformat.writes(notebook), encoding="utf-8")
