"""Run as a process: call a program for each line of the input, as one of two clients of a Hub, online and offline.

This process imports the libraries that know nothing of a Hub. Each client is a fork of it, and imports the others in
its own environment, which huggingface_hub reads then. Each program runs in a fork of its client.

A line holds, as JSON, whether the client is offline, the name of the program, its arguments, and variables of its
environment. The answer is the exit status and what was printed.
"""

import json
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection

import IPython.core.interactiveshell
import matplotlib.backends.backend_agg
import PIL.Image
import sklearn.datasets
import sklearn.metrics
import sklearn.model_selection
import torch._dynamo


__all__ = ["PIL", "IPython", "matplotlib", "sklearn", "torch"]

ENVIRONMENTS = {False: {}, True: {"HF_HUB_OFFLINE": "1"}}
"""Variables of a client's environment, by whether it is offline."""


def serve(variables: dict[str, str], calls: Connection, callers_end: Connection) -> None:
    """Import the libraries of a client, and answer calls until there are no more."""
    callers_end.close()  # or the end of the calls would not be seen
    os.environ.update(variables)
    from tests.hub.programs import answer

    while True:
        try:
            call = calls.recv()
        except EOFError:
            return
        calls.send(answer(*call))


def main() -> None:
    assert "huggingface_hub" not in sys.modules
    forks, clients = multiprocessing.get_context("fork"), {}
    for line in sys.stdin:
        offline, *call = json.loads(line)
        if offline not in clients:
            clients[offline], calls = forks.Pipe()
            forks.Process(target=serve, args=(ENVIRONMENTS[offline], calls, clients[offline])).start()
            calls.close()
        clients[offline].send(call)
        sys.stdout.write(json.dumps(clients[offline].recv()) + "\n")
        sys.stdout.flush()
    for client in clients.values():
        client.close()


if __name__ == "__main__":
    main()
