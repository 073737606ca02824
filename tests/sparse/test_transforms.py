"""Derivatives of any order and kind, batched and traced products, against autograd through a dense W + ΔW."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from peft_fps.sparse import Geometry, Layout, build_structure, sparse_convolution, sparse_delta_linear, sparse_linear
from tests.support.helpers import csr, flat_positions, normal


# torch's own forward-mode rules too; the category depends on the version of torch
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

Product = Callable[[Tensor, Tensor, Tensor], Tensor]

ROWS, INPUTS = [[0, 3], [], [0, 3, 5], [0, 1, 2, 3, 4, 5], [5]], 6
PATCHES = [[0, 7], [], [3], list(range(8))]
GEOMETRY = ((2, 1), (1, 0), (1, 2), 2)
SPREAD = ((2, 1), (1, 0), (1, 0), 2, (1, 2))  # stride, padding, output padding, groups, dilation


def dense(weight: Tensor, values: Tensor, rows: list[list[int]], inputs: int, transposed: bool = False) -> Tensor:
    places = torch.tensor(flat_positions(rows, inputs, transposed))
    summed = (weight.reshape(-1) + torch.zeros(weight.numel()).double().index_add(0, places, values)).view(
        weight.shape
    )
    return summed.t() if transposed else summed


def products() -> dict[str, tuple[Product, Product, list[Tensor]]]:
    """Ours and a dense product of (x, values, bias), and arguments."""
    weight, kernel = normal(5, INPUTS, dtype=torch.float64), normal(4, 2, 2, 2, dtype=torch.float64)
    plain, turned = (build_structure(*csr(ROWS), 5, INPUTS, Layout(transposed)) for transposed in (False, True))
    patches, stored = build_structure(*csr(PATCHES), 4, 8), weight.t().contiguous()
    x, values, bias = (normal(*shape, seed=2, dtype=torch.float64) for shape in ((3, INPUTS), (12,), (5,)))
    image = normal(2, 4, 4, 3, dtype=torch.float64)
    stride, padding, output_padding, groups, dilation = SPREAD
    geometry = Geometry(stride, padding, dilation, groups, True, output_padding)
    spread = build_structure(*csr(PATCHES), 4, 8, Layout(True, groups=2, taps=4))

    def scattered(values: Tensor) -> Tensor:
        """ΔW of the transposed convolution: of neuron and column to channel, place in the group, and tap."""
        places = [
            ((row // 2 * 2 + column // 4) * 2 + row % 2) * 4 + column % 4
            for row, columns in enumerate(PATCHES)
            for column in columns
        ]
        return torch.zeros(32).double().index_add(0, torch.tensor(places), values).view(kernel.shape)

    return {
        "linear": (
            lambda x, v, b: sparse_linear(x, weight, v, b, plain),
            lambda x, v, b: F.linear(x, dense(weight, v, ROWS, INPUTS), b),
            [x, values, bias],
        ),
        "transposed": (
            lambda x, v, b: sparse_linear(x, stored, v, b, turned),
            lambda x, v, b: F.linear(x, dense(stored, v, ROWS, INPUTS, True), b),
            [x, values, bias],
        ),
        "delta": (
            lambda x, v, b: sparse_delta_linear(x, v, plain) + b,
            lambda x, v, b: F.linear(x, dense(torch.zeros_like(weight), v, ROWS, INPUTS), b),
            [x, values, bias],
        ),
        "conv": (
            lambda x, v, b: sparse_convolution(x, kernel, v, b, patches, Geometry(*GEOMETRY)),
            lambda x, v, b: F.conv2d(x, dense(kernel, v, PATCHES, 8), b, *GEOMETRY),
            [image, values[:11], bias[:4]],
        ),
        "transposed conv": (
            lambda x, v, b: sparse_convolution(x, kernel, v, b, spread, geometry),
            lambda x, v, b: F.conv_transpose2d(x, kernel + scattered(v), b, *SPREAD),
            [image, values[:11], bias[:4]],
        ),
    }


KINDS = list(products())
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
    ours, naive, arguments = products()[kind]
    apply = TRANSFORMS[transform]
    torch.testing.assert_close(apply(ours, tuple(arguments)), apply(naive, tuple(arguments)))


@pytest.mark.parametrize("trained", ALL, ids=["inputs", "values", "biases"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_on_gradients_of_inputs(kind: str, trained: int):
    ours, naive, arguments = products()[kind]
    found = []
    for product in (ours, naive):
        leaves = [t.clone().requires_grad_(place in (0, trained)) for place, t in enumerate(arguments)]
        (slope,) = torch.autograd.grad(score(product)(*leaves), leaves[0], create_graph=True)
        slope.square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_biases_can_be_differentiated(kind: str):
    ours, naive, arguments = products()[kind]
    found = []
    for product in (ours, naive):
        leaves = [tensor.clone().requires_grad_() for tensor in arguments]
        (slope,) = torch.autograd.grad(score(product)(*leaves), leaves[2], create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), leaves))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "loss", [score, lambda product: lambda *arguments: product(*arguments).sum()], ids=["", "sum"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_derivative_of_the_values_is_refused(kind: str, loss: Callable[[Product], Callable[..., Tensor]]):
    ours, _, arguments = products()[kind]
    leaves = [tensor.clone().requires_grad_() for tensor in arguments]
    (first,) = torch.autograd.grad(loss(ours)(*leaves), leaves[1], create_graph=True)
    with pytest.raises(ValueError, match=r"fps_values is differentiated again, .* torch.func .*merge_and_unload"):
        first.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [False, True])
def test_many_gradients_at_once(kind: str, again: bool):
    ours, naive, arguments = products()[kind]
    found = []
    for product in (ours, naive):
        leaves = [tensor.clone().requires_grad_() for tensor in arguments]
        result = product(*leaves)
        many = torch.stack([result.detach().cos(), result.detach().sin()])
        found.append(torch.autograd.grad(result, leaves, many, is_grads_batched=True, create_graph=again))
    torch.testing.assert_close(*found)


def test_many_gradients_at_once_where_a_kernel_would_be_taken():
    rows = [[row % 50, 50 + row % 40] for row in range(64)]
    structure, weight, x = build_structure(*csr(rows), 64, 96), normal(64, 96), normal(200, 96, seed=1)
    values = normal(128, seed=2).requires_grad_()
    many = normal(3, 200, 64, seed=3)
    result = sparse_linear(x, weight, values, None, structure)
    (found,) = torch.autograd.grad(result, values, many, is_grads_batched=True)
    expected = torch.einsum("mtn,ti->mni", many, x).flatten(1)[:, flat_positions(rows, 96)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_product_can_be_saved(kind: str, trained: bool):
    ours, naive, arguments = products()[kind]
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
