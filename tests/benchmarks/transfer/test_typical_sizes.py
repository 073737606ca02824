"""Against the plain model, with autograd of every image's own loss."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_fps.benchmarks.transfer.typical_sizes import gather_sizes
from tests.support.helpers import adapted, images, layers_of, tiny_vit, unchanged


def labelled_images() -> list[dict[str, torch.Tensor]]:
    """Batches of two sizes."""
    return [{"pixel_values": images(size, seed=size), "labels": torch.arange(size) % 3} for size in (4, 3)]


def reference(base: nn.Module, paths, data):
    """Mean |a|, root mean square of a, and mean |δ|, by path; inputs of the convolution left out."""
    inputs, outputs = {path: [] for path in paths}, {path: [] for path in paths}

    def keep(path):
        def hook(module, args, output):
            inputs[path].append(args[0].detach().double())
            outputs[path].append(output)

        return hook

    for path in paths:
        base.get_submodule(path).register_forward_hook(keep(path))
    for batch in data:
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            logits = base.eval()(pixel_values=image[None]).logits
            loss = F.cross_entropy(logits, label[None])
            made = [outputs[path][-1] for path in paths]
            for path, gradient in zip(paths, torch.autograd.grad(loss, made), strict=True):
                outputs[path][-1] = gradient.double()
    found = {}
    for path in paths:
        deltas = torch.cat(outputs[path])
        deltas = deltas.flatten(2).transpose(1, 2) if deltas.dim() == 4 else deltas
        x = torch.cat(inputs[path]).flatten(0, -2)
        found[path] = x.abs().mean(0), x.square().mean(0).sqrt(), deltas.abs().mean((0, 1))
    return found


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_sizes_are_those_of_the_plain_model(backward, training):
    model, data = adapted(tiny_vit(), filled=False).train(training), labelled_images()
    with unchanged(model):
        found = gather_sizes(model, data, backward)
    assert all(parameter.grad is None for parameter in model.parameters())
    paths = list(layers_of(model))
    assert list(found) == paths
    for path, (mean, root, gradient) in reference(deepcopy(tiny_vit()), paths, data).items():
        if "projection" not in path:
            torch.testing.assert_close(found[path].mean_input, mean, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found[path].root_mean_square, root, rtol=1e-4, atol=1e-6)
        expected = gradient if backward else torch.zeros_like(gradient)
        torch.testing.assert_close(found[path].mean_gradient, expected, rtol=1e-3, atol=1e-8)


def test_a_pass_that_fails_leaves_the_model_as_it_was():
    model = adapted(tiny_vit(), filled=False).train()
    data = [*labelled_images(), {"pixel_values": torch.zeros(1, 3, 8, 8), "labels": torch.tensor([0])}]
    with unchanged(model), pytest.raises(ValueError, match="Input image size"):
        gather_sizes(model, data, backward=True)


def test_inputs_of_a_convolution_are_those_of_its_patches():
    model, data = adapted(tiny_vit(), filled=False), labelled_images()[:1]
    path = next(path for path in layers_of(model) if "projection" in path)
    patches = F.unfold(data[0]["pixel_values"], 4, stride=4).double()
    torch.testing.assert_close(gather_sizes(model, data)[path].mean_input, patches.abs().mean((0, 2)))
