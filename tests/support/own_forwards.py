"""Layers whose class has a forward of its own."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Normalised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=1), self.bias)


class Times(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.weight.sign().cumsum(0)) + 2 * self.bias


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True) + 1e-3).sqrt()
        return F.conv2d(x, flat.view_as(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


class PadsFirst(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 2, 1)), self.weight, None, stride=self.stride, groups=self.groups)


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)), self.weight, self.bias)


class Trimmed(nn.ConvTranspose1d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x, output_size)[..., : -self.stride[0]] * 2


class Halved(nn.Conv2d):
    """Has another product, and torch's forward."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / 2, bias)
