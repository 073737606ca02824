"""Pre-train the embedded default model: a tiny ViT that classifies letters and signs, no digits.

The glyphs come from the fonts bundled with matplotlib, drawn the way the 8x8 scans of scikit-learn's
`load_digits` were made: a 32x32 bitmap whose 4x4 blocks are counted into 17 grey levels, white ink on black.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification


logger = logging.getLogger(__name__)

# Left out: digits, glyphs that pass for one (O, I, i, l, |, !, /), and lower case that equals its scaled upper case.
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ" + "abdefghmnqrty"
SIGNS = "&?#@%+=*<>" + "ΓΔΞΠΣΦΨΩλμπ"
GLYPHS = LETTERS + SIGNS
TEXT_FONTS = (
    *(f"DejaVuSans{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique", "Mono", "Mono-Oblique")),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "Italic", "BolIta")),
)
# The Computer Modern files encode signs at other code points than Unicode, so only their letters are usable.
LETTER_FONTS = tuple(f"cm{family}10.ttf" for family in ("b", "mi", "r", "ss", "ti", "tt"))
IMAGE, GRID, LEVELS, BATCH, HELD_OUT = 32, 8, 16, 128, 4_000
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    **{"do_resize": True, "size": {"height": IMAGE, "width": IMAGE}, "resample": 2},
    **{"do_rescale": True, "rescale_factor": 1 / 255},
    **{"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
}
README = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
---
# Tiny glyph ViT

Classifies {classes} letters and signs (no digits): {parameters:,} parameters, 3 layers of width 192, stored in float16
(load with `dtype=torch.float32` to train). Input: an 8x8 grey scan, white ink on black, enlarged to 32x32 RGB.

Pre-trained from scratch on {samples:,} synthetic scans of glyphs from the fonts bundled with matplotlib, with random
affine maps, stroke widths, blur, contrast and noise, for {epochs} epochs. The default of 2 is short on purpose:
after 6, a linear head on frozen features already names about 95 % of 8x8 digits, which leaves fine-tuning little to
show.

Accuracy on {held_out:,} held-out renderings (same fonts, new distortions): {score:.3f}. Licence: Apache-2.0.

Made by `python -m peft_fps.vision.pretraining OUTPUT_DIR --seed {seed} --epochs {epochs} --samples {samples}`.
"""


def load_fonts() -> list[list[Any]]:
    """Return, for each glyph of `GLYPHS`, the PIL fonts (64 pixels per em) that can draw it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pre-training needs matplotlib, whose fonts it draws glyphs from") from error
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    text, letters = (
        [ImageFont.truetype(str(folder / name), 64, layout_engine=ImageFont.Layout.BASIC) for name in names]
        for names in (TEXT_FONTS, LETTER_FONTS)
    )
    return [text + letters if glyph in LETTERS else text for glyph in GLYPHS]


def render(glyph: str, font: Any, rng: np.random.Generator) -> np.ndarray:
    """Draw one distorted glyph; returns grey levels `0..16`, uint8 of shape `(8, 8)`."""
    canvas = Image.new("L", (160, 160))
    stroke = int(rng.integers(0, 4))
    ImageDraw.Draw(canvas).text((80, 80), glyph, fill=255, font=font, anchor="mm", stroke_width=stroke)
    turn, shear, stretch = rng.normal(0, 0.12), rng.normal(0, 0.15), np.exp(rng.normal(0, 0.12))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = rotation @ np.array([[stretch, shear], [0, 1]])
    shift = np.array([80, 80]) - matrix @ np.array([80, 80])
    coefficients = (*matrix[0], shift[0], *matrix[1], shift[1])
    canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    ink = canvas.crop(canvas.getbbox())
    scale = IMAGE * rng.uniform(0.88, 1) / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    page = Image.new("L", (IMAGE, IMAGE))
    left, top = (IMAGE - width + int(rng.integers(-1, 2))) // 2, (IMAGE - height + int(rng.integers(-1, 2))) // 2
    page.paste(ink.resize((width, height), Image.Resampling.BILINEAR), (left, top))
    page = page.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))
    blocks = np.asarray(page.reduce(IMAGE // GRID), dtype=np.float64) / 255 * LEVELS * rng.uniform(0.8, 1.5)
    blocks += rng.normal(0, 0.8, blocks.shape) * (blocks > 0.5)
    return blocks.round().clip(0, LEVELS).astype(np.uint8)


def make_scans(count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Render `count` scans of uniformly drawn glyphs; returns levels `(count, 8, 8)` and labels `(count,)`."""
    fonts = load_fonts()
    labels = rng.integers(0, len(GLYPHS), count)
    scans = [render(GLYPHS[label], fonts[label][rng.integers(len(fonts[label]))], rng) for label in labels]
    return torch.from_numpy(np.stack(scans)), torch.from_numpy(labels)


def to_pixels(levels: torch.Tensor) -> torch.Tensor:
    """Enlarge grey levels `0..16` of shape `(n, 8, 8)` to pixel values `-1..1` of shape `(n, 3, 32, 32)`."""
    grey = F.interpolate(levels[:, None].float() / LEVELS, size=IMAGE, mode="bilinear", align_corners=False)
    return (grey * 2 - 1).expand(-1, 3, -1, -1)


def train(model: ViTForImageClassification, levels: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """Fit `model` in place on levels `(n, 8, 8)` and labels `(n,)`: AdamW under a one-cycle learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * -(-len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.15)
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(labels)).split(BATCH):
            loss = F.cross_entropy(model(to_pixels(levels[rows])).logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        logger.info("epoch %d of %d: last loss %.3f", epoch + 1, epochs, loss.item())


@torch.no_grad()
def accuracy(model: ViTForImageClassification, levels: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of scans `(n, 8, 8)` whose glyph `model` names as in `labels` `(n,)`."""
    model.eval()
    guesses = [model(to_pixels(part)).logits.argmax(-1) for part in levels.split(512)]
    return (torch.cat(guesses) == labels).float().mean().item()


def build_model() -> ViTForImageClassification:
    """Return the untrained model: under 2 MB once stored in float16."""
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 3}
    labels = {"id2label": dict(enumerate(GLYPHS)), "label2id": {glyph: index for index, glyph in enumerate(GLYPHS)}}
    settings: dict[str, Any] = {"image_size": IMAGE, "patch_size": 8, **sizes, **labels}
    return ViTForImageClassification(ViTConfig(**settings))


def save(model: ViTForImageClassification, folder: Path, facts: dict[str, Any]) -> None:
    """Write the model as it is, its preprocessor and a README with `facts` filled in to `folder`."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(README.format(**facts), encoding="utf-8")


def main() -> None:
    """Parse the command line, pre-train, round to float16, measure and save."""
    parser = argparse.ArgumentParser(description="Pre-train the embedded default model without network access.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=20_000, help="number of training renderings")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    # The order of floating-point sums depends on the number of threads.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    train_set, held_out = make_scans(args.samples, rng), make_scans(HELD_OUT, rng)
    model = build_model()
    train(model, *train_set, args.epochs)
    score = accuracy(model.half().float(), *held_out)
    logger.info("held-out accuracy %.3f", score)
    facts = {"classes": len(GLYPHS), "parameters": model.num_parameters(), "held_out": HELD_OUT, "score": score}
    save(model.half(), args.output_dir, {**facts, **vars(args)})


if __name__ == "__main__":
    main()
