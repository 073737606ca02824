"""Kernels of notebooks that are forked from a process that has imported the libraries, instead of started anew."""

import os
import signal
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from jupyter_client.provisioning.factory import KernelProvisionerFactory
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from tests.support.forked import FORKS, start


def fork_kernels() -> None:
    """Let kernels that this process starts be forked, where the system can."""
    if FORKS:
        factory = KernelProvisionerFactory.instance()
        entry = EntryPoint("forked", f"{__name__}:ForkedKernel", KernelProvisionerFactory.GROUP_NAME)
        factory.provisioners[entry.name] = entry
        factory.default_provisioner_name = entry.name


class ForkedProcess:
    """A process with what the provisioner asks of one of `subprocess`."""

    stdin = stdout = stderr = None

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._process = start(_run_kernel, arguments, folder=folder, **environment)
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class ForkedKernel(LocalProvisioner):
    """Starts a kernel of IPython as a `ForkedProcess`."""

    process: Any = None
    pid: Any = None
    cwd: Any = None

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        module = cmd.index("ipykernel_launcher")
        folder = Path(kwargs.get("cwd") or Path.cwd())
        self.process = ForkedProcess(cmd[module + 1 :], folder, kwargs["env"])
        self.pid, self.cwd = self.process.pid, folder
        return self.connection_info


def _run_kernel(arguments: list[str]) -> None:
    os.environ["JPY_PARENT_PID"] = str(os.getppid())  # the kernel ends with its parent, the server
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(arguments)
