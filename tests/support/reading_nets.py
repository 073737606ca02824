"""A network in which three layers read one tensor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.helpers import (
    normal,
)


WIDTH, TOKENS = 24, (3, 5)


READERS = ["query", "key", "value"]


class Net(nn.Module):
    """A plain layer, something that produces a tensor, and three layers that read it."""

    def __init__(self, middle: nn.Module, neurons: int = 8) -> None:
        super().__init__()
        self.before = nn.Linear(6, WIDTH)
        self.middle = middle
        self.query, self.key, self.value = (nn.Linear(WIDTH, neurons, bias=i != 1) for i in range(3))
        self.between: Callable[[Tensor, Tensor], Any] = lambda source, y: y
        self.around_reading: Callable[..., Tensor] = lambda function, *args: function(*args)

    def read(self, y: Tensor) -> Tensor:
        return self.query(y) * self.key(y).sigmoid() + self.value(y)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        y = self.middle(h)
        y = self.between(h, y)
        return self.around_reading(self.read, y)


def net(middle: Callable[[], nn.Module], neurons: int = 8, outside: Callable[[nn.Module], Any] | None = None) -> Net:
    """The same at every call; `outside` changes it before it gets an adapter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net(middle(), neurons)
        with torch.no_grad():
            for parameter in model.middle.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    if outside is not None:
        outside(model)
    return model.eval()


def inputs(seed: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*TOKENS, 6, seed=seed).to(dtype).requires_grad_()


def saved(model: nn.Module, context: Callable[[], Any] = nullcontext, dtype: torch.dtype = torch.float32) -> int:
    with saved_storages(model) as found, context():
        result = model(inputs(dtype=dtype))
    assert result.requires_grad
    return sum(found.values())


@contextmanager
def saved_storages(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of every storage that the graph keeps, by its address; those of the model itself are left out."""
    kept: list[Tensor] = []  # holds them, so that no address is used twice
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found
