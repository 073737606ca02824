"""Our part of a model card as Markdown, and its place in the card's text."""

import json
import re
from collections.abc import Iterable
from typing import Any

from peft_fps.card.facts import Facts


BEGIN, END = "<!-- peft_fps: begin; written anew on every save -->", "<!-- peft_fps: end -->"
"""What is between these two lines belongs to this package; all else in a card is somebody else's."""

NAMED = 6
"""Tensors trained whole that are listed by name."""

LONGEST = 400
"""Characters of a value that a card shows; a config may come from anywhere."""


def put(text: str, part: str) -> str:
    """Return a card's text with our part in it, between our marks.

    It takes the place of an older part, or stands before the first `##` heading. Putting the same part again changes
    nothing, and the rest of the text stays as it is.
    """
    block = f"{BEGIN}\n{part}\n{END}"
    stop = text.find(END)
    start = text.rfind(BEGIN, 0, max(stop, 0))  # the last before: a mark without its partner is text like any other
    if start >= 0:
        return text[:start] + block + text[stop + len(END) :]
    fenced, position = False, 0
    for line in text.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            return f"{text[:position]}{block}\n\n{text[position:]}"
        position += len(line)
    return f"{text.rstrip()}\n\n{block}"


def render(facts: Facts) -> str:
    """Return our part of a card, without its marks."""
    trained = f"{facts.entries:,} entries of existing weights"
    if facts.biases:
        trained += f" and {facts.biases:,} biases"
    base = "its base model" if facts.base_model is None else code(facts.base_model)
    merged = "a plain model" if not facts.token_blocks else "a plain model that goes on selecting tokens"
    parts = [
        "## FPS adapter",
        f"This adapter changes {trained} of {base}, selected by {plain(facts.method)}. It adds no layers; merged, it "
        f"leaves {merged}.",
        "### Loading",
        f"```python\n{loading_snippet(facts)}\n```",
        "### Selection",
        table(("", ""), _rows(facts)),
    ]
    if facts.picture is not None:
        parts.append(f"![Where the selected entries are]({facts.picture})")
    if facts.evaluation is not None:
        measured = facts.evaluation
        metrics = [(code(name), f"{value:.4g}") for name, value in measured.metrics.items()]
        on = ", ".join(plain(value) for part, value in measured.dataset.items() if part != "type")
        parts += ["### Evaluation", f"By the Trainer on {on}, {measured.when}:", table(("metric", "value"), metrics)]
    return "\n\n".join(parts)


def loading_snippet(facts: Facts) -> str:
    """Return Python code that loads the adapter."""
    name = facts.base_class if facts.base_class is not None and facts.base_class.isidentifier() else None
    imports = ["import peft_fps  # registers the method with PEFT; has to come first", "from peft import PeftModel"]
    if name is None:
        base = "model = ...  # the base model, with the weights that the adapter was made from"
    else:
        imports.append(f"from transformers import {name}")
        options = "" if facts.labels is None else f", num_labels={facts.labels}, ignore_mismatched_sizes=True"
        base = f"model = {name}.from_pretrained({_literal(facts.base_model, 'path/or/name/of/the/base')}{options})"
    within = "" if facts.subfolder is None else f", subfolder={_literal(facts.subfolder, 'its/name')}"
    loading = f"model = PeftModel.from_pretrained(model, {_literal(facts.location, 'path/or/name')}{within})"
    merging = "model = model.merge_and_unload()  # if a plain model is wanted"
    return "\n".join([*imports, "", base, loading, merging])


def table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    """Return a Markdown table of two columns, whose cells are Markdown already."""
    return "\n".join(f"| {left} | {right} |" for left, right in [head, ("---", "---"), *rows])


def code(value: Any) -> str:
    """Return a value as a code span on one line, which fits into a table and cannot end early."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return f"`{_one_line(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def plain(text: str) -> str:
    """Return text on one line, escaped so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", _one_line(text))


def percent(share: float) -> str:
    """Return a share in percent, to four digits."""
    return f"{100 * share:.4g} %"


def _rows(facts: Facts) -> list[tuple[str, str]]:
    """Return the rows of the table on the selection: what it is about, and the value as Markdown."""
    asked = facts.settings
    chosen = ", ".join(code(f"{key}={asked[key]!r}") for key in ("importance", "order", "granularity", "bias"))
    if asked["budget"] is None:
        limit = f"{asked['per_neuron']:g} entries per neuron"
    else:
        limit = f"{percent(asked['budget'])} of the base model's parameters"
    if asked["budget_pattern"]:
        limit += f", except {code(asked['budget_pattern'])}"
    rows = [("method", f"FPS, {chosen}"), ("asked for", limit)]
    of_weights = f", {percent(facts.entries / facts.weights)} of their weights" if facts.weights else ""
    rows.append(("entries", f"{facts.entries:,} in {facts.modules:,} modules{of_weights}"))
    if facts.biases is not None:
        rows.append(("biases", f"{facts.biases:,}"))
        if facts.base_parameters:
            trained = facts.entries + facts.biases
            share = f"{percent(trained / facts.base_parameters)} of {facts.base_parameters:,}"
            rows.append(("together", f"{trained:,}, {share} parameters without the output head"))
    if facts.token_blocks:
        blocks = ", ".join(map(str, facts.token_blocks))
        kept = f"{percent(asked['token_keep_rate'])} of the patches stay in blocks {blocks}, the others become one"
        rows.append(("tokens", kept))
    if facts.whole:
        numbers = [_product(shape) for shape in facts.whole.values()]
        names = ", ".join(map(code, facts.whole)) if len(numbers) <= NAMED else f"{len(numbers):,} tensors"
        rows.append(("trained whole", f"{sum(numbers):,} parameters: {names}"))
    if facts.calibration is not None:
        rows.append(("calibration", code(facts.calibration)))
    if facts.base_model is not None:
        rows.append(("base model", code(facts.base_model)))
    if facts.fingerprint is not None:
        rows.append(("its fingerprint", f"{code(facts.fingerprint['sha256'])}, {code(facts.fingerprint['dtype'])}"))
    return [*rows, ("file", f"{code(facts.file)}, {facts.bytes:,} bytes, format version {facts.format_version}")]


def _product(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a tensor of this shape."""
    result = 1
    for size in shape:
        result *= size
    return result


def _one_line(text: str) -> str:
    """Return text on one line, without a mark of ours in it, and cut to `LONGEST` characters."""
    text = " ".join(text.split()).replace("<!--", "<! --")  # no value may hold one of our marks
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _literal(text: str | None, otherwise: str) -> str:
    """Return a Python string that holds the text, or a placeholder if it is empty or strange."""
    usual = text is not None and 0 < len(text) <= LONGEST and text.isprintable() and not set(text) & set('"\\<`')
    return f'"{text if usual else otherwise}"'
