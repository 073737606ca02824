"""Stand-ins for parameters: made when they are read, formed again in backward, and not kept between."""

import weakref

import pytest
import torch
from torch import Tensor

from peft_fps.sparse import Layout, build_structure
from peft_fps.sparse.stand_ins import StandIn, changed_stand_in, formed_again
from tests.support.helpers import csr, normal


STRUCTURE = build_structure(*csr([[0, 2], [1], [], [3]]), 4, 4, Layout(groups=2, stacked=True))


def dense(values: Tensor) -> Tensor:
    change = torch.zeros(4, 4).index_put((torch.tensor([0, 0, 1, 3]), torch.tensor([0, 2, 1, 3])), values)
    return (normal(4, 4) + change).view(2, 2, 4)


def loss_of(weight: Tensor, x: Tensor) -> Tensor:
    return sum(((x @ weight[matrix].t()).exp().sum() for matrix in range(2)), torch.zeros(()))


def test_gradients_are_those_of_a_dense_sum_and_the_weight_is_not_kept() -> None:
    values, x = normal(4, seed=1).requires_grad_(), normal(3, 4, seed=2).requires_grad_()
    found = changed_stand_in(normal(4, 4).view(2, 2, 4), values, STRUCTURE)
    with formed_again([found]):
        loss = loss_of(found.tensor(), x)
        made = weakref.ref(found.tensor())
    assert made() is None
    result = torch.autograd.grad(loss, [values, x], retain_graph=True)
    expected = torch.autograd.grad(loss_of(dense(values), x), [values, x])
    for _ in range(2):
        for one, other in zip(result, expected, strict=True):
            torch.testing.assert_close(one, other)
        result = torch.autograd.grad(loss, [values, x], retain_graph=True)


def test_second_derivatives() -> None:
    values, x = normal(4, seed=1).requires_grad_(), normal(3, 4, seed=2)
    found = changed_stand_in(normal(4, 4).view(2, 2, 4), values, STRUCTURE)
    with formed_again([found]):
        loss = loss_of(found.tensor(), x)
    second = []
    for each in (loss, loss_of(dense(values), x)):
        (first,) = torch.autograd.grad(each, values, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), values)[0])
    torch.testing.assert_close(*second)


def test_a_change_in_place_before_backward_is_refused() -> None:
    weight, values = normal(4, 4).view(2, 2, 4), normal(4, seed=1).requires_grad_()
    for changed in (weight, values.detach()):
        found = changed_stand_in(weight, values, STRUCTURE)
        with formed_again([found]):
            loss = loss_of(found.tensor(), normal(3, 4, seed=2).requires_grad_())
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified in place between forward and backward"):
            loss.backward()


def test_it_is_made_once_and_only_if_it_is_read() -> None:
    calls: list[int] = []

    def make() -> Tensor:
        calls.append(1)
        return normal(2, 2)

    used, unused = StandIn(make), StandIn(make)
    with formed_again([used, unused]):
        assert used.tensor() is used.tensor()
    assert len(calls) == 1
