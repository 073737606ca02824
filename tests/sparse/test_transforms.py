"""Derivatives of any order and kind, batched and traced products, against autograd through a dense W + ΔW."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from peft_fps.sparse import sparse_linear
from tests.sparse import cases
from tests.sparse.cases import KINDS, Product, built, products
from tests.support.helpers import flat_positions, normal


# torch's own forward-mode rules too; the category depends on the version of torch
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

ALL = (0, 1, 2)


def score(product: Product) -> Callable[..., Tensor]:
    return lambda *arguments: product(*arguments).sin().square().sum()


def total(product: Product) -> Callable[..., Tensor]:
    return lambda *arguments: product(*arguments).sum()


def in_dual_numbers(product: Product, arguments: tuple[Tensor, ...]) -> Any:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, tensor.cos()) for tensor in arguments]
        return tuple(forward_ad.unpack_dual(product(*duals)))


def of_each_sample(product: Product, arguments: tuple[Tensor, ...]) -> Any:
    x, values, bias = arguments
    return vmap(grad(lambda v, b, x: score(product)(x[None], v, b), (0, 1)), (None, None, 0))(values, bias, x)


TRANSFORMS: dict[str, Callable[[Product, tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, a: grad(score(f), ALL)(*a),
    "vjp": lambda f, a: vjp(f, *a)[1](f(*a).cos()),
    "jvp": lambda f, a: jvp(f, a, tuple(tensor.cos() for tensor in a)),
    "jacrev": lambda f, a: jacrev(f, ALL)(*a),
    "jacfwd": lambda f, a: jacfwd(f, ALL)(*a),
    "hessian": lambda f, a: hessian(score(f), ALL)(*a),
    "dual numbers": in_dual_numbers,
    "per-sample gradients": of_each_sample,
    "an ensemble of adapters": lambda f, a: vmap(f, (None, 0, 0))(a[0], *(torch.stack([t, -t]) for t in a[1:])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_transforms(kind: str, transform: str):
    ours, naive, arguments, _ = products(3)[kind]
    apply = TRANSFORMS[transform]
    torch.testing.assert_close(apply(ours, tuple(arguments)), apply(naive, tuple(arguments)))


@pytest.mark.parametrize("trained", ALL, ids=["inputs", "values", "biases"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_on_gradients_of_inputs(kind: str, trained: int):
    ours, naive, arguments, _ = products(3)[kind]
    found = []
    for product in (ours, naive):
        leaves = [t.clone().requires_grad_(place in (0, trained)) for place, t in enumerate(arguments)]
        (slope,) = torch.autograd.grad(score(product)(*leaves), leaves[0], create_graph=True)
        slope.square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_biases_can_be_differentiated(kind: str):
    ours, naive, arguments, _ = products(3)[kind]
    found = []
    for product in (ours, naive):
        leaves = cases.leaves(*arguments)
        (slope,) = torch.autograd.grad(score(product)(*leaves), leaves[2], create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), leaves))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("loss", [score, total], ids=["", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_derivative_of_the_values_is_refused(kind: str, loss: Callable[[Product], Callable[..., Tensor]]):
    ours, _, arguments, _ = products(3)[kind]
    leaves = cases.leaves(*arguments)
    (first,) = torch.autograd.grad(loss(ours)(*leaves), leaves[1], create_graph=True)
    with pytest.raises(ValueError, match=r"fps_values is differentiated again, .* torch.func .*merge_and_unload"):
        first.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [False, True])
def test_many_gradients_at_once(kind: str, again: bool):
    ours, naive, arguments, _ = products(3)[kind]
    found = []
    for product in (ours, naive):
        leaves = cases.leaves(*arguments)
        result = product(*leaves)
        many = torch.stack([result.detach().cos(), result.detach().sin()])
        found.append(torch.autograd.grad(result, leaves, many, is_grads_batched=True, create_graph=again))
    torch.testing.assert_close(*found)


def test_many_gradients_at_once_where_a_kernel_would_be_taken():
    rows = [[row % 50, 50 + row % 40] for row in range(64)]
    structure, weight, x = built(rows, 96), normal(64, 96), normal(200, 96, seed=1)
    values = normal(128, seed=2).requires_grad_()
    many = normal(3, 200, 64, seed=3)
    result = sparse_linear(x, weight, values, None, structure)
    (found,) = torch.autograd.grad(result, values, many, is_grads_batched=True)
    expected = torch.einsum("mtn,ti->mni", many, x).flatten(1)[:, flat_positions(rows, 96)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_product_can_be_saved(kind: str, trained: bool):
    ours, naive, arguments, _ = products(3)[kind]
    arguments = [tensor.clone().requires_grad_(trained) for tensor in arguments]
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(ours, tuple(arguments)), stream)
    stream.seek(0)
    loaded = torch.jit.load(stream)
    others = [(2 * tensor).detach().requires_grad_(trained) for tensor in arguments]
    torch.testing.assert_close(loaded(*others), naive(*others))
    if trained:
        found = torch.autograd.grad(loaded(*others).square().sum(), others)
        torch.testing.assert_close(found, torch.autograd.grad(naive(*others).square().sum(), others))
