"""Parts of a vision transformer that refuse, while tokens are selected, what needs every patch."""

import inspect
from typing import Any

from torch import Tensor

from peft_fps.tokens.selecting_blocks import Switched


class UnmaskedEmbeddings(Switched):
    """Embeddings of transformers that refuse masked patches while tokens are selected."""

    def forward(self, pixel_values: Tensor, bool_masked_pos: Any = None, **kwargs: Any) -> Any:
        """Return the embedded tokens `(batch, tokens, width)` of images `(batch, channels, height, width)`.

        Raises:
            ValueError: patches are masked, and tokens are selected.
        """
        if bool_masked_pos is not None and self.token_switch.keep_rate() < 1:
            raise ValueError(
                f"{self.token_switch.path}: found bool_masked_pos while tokens are selected (token_keep_rate), "
                "expected whole images: a masked patch may be one that does not stay. Leave the mask out, or call "
                "model.set_token_keep_rate(1.0)."
            )
        return super().forward(pixel_values, bool_masked_pos=bool_masked_pos, **kwargs)


class MaplessTransformer(Switched):
    """timm's `VisionTransformer`, which refuses to lay out its patches as maps while tokens are selected.

    timm reshapes what is left of the patches to height x width x channels, which may fit by chance.
    """

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what timm's method returns for images `(batch, channels, height, width)`.

        Raises:
            ValueError: maps are asked for, and tokens are selected.
        """
        plain: Any = super()
        called = inspect.signature(plain.forward_intermediates).bind(x, *args, **kwargs)
        called.apply_defaults()
        if called.arguments["output_fmt"] == "NCHW" and self.token_switch.keep_rate() < 1:
            raise ValueError(
                f"{self.token_switch.path or self.plain_class.__name__}: found a call for maps of patches, as hidden "
                "states of timm's models are, while tokens are selected (token_keep_rate), expected one for the "
                "output or for sequences (output_fmt='NLC'), which differ in length between blocks. Ask for one of "
                "these, or call model.set_token_keep_rate(1.0)."
            )
        return plain.forward_intermediates(x, *args, **kwargs)
