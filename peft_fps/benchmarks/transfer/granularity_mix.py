"""Between FPS's granularities: every neuron gets one entry, and the layer's best candidates get the rest."""

import torch

from peft_fps.selection.candidate import Candidate, Selected
from peft_fps.selection.select import select_by_neuron
from peft_fps.selection.topk import top_k, top_k_flat


def select_one_each(candidate: Candidate) -> Selected:
    """Select the best entry of every neuron, and then the best of all others, regardless of their neurons.

    With fewer entries than neurons, the neurons with the best entries get one each.

    Args:
        candidate: layer with scores and a number of entries.

    Returns:
        Columns `(nnz,)` and row counts `(neurons,)`, int64.
    """
    neurons, inputs = candidate.shape.neurons, candidate.shape.inputs
    if candidate.entries <= neurons:
        return select_by_neuron(candidate)
    scores = candidate.score(0, neurons)
    first = top_k(scores, 1)[0]
    others = top_k_flat(scores.scatter(1, first, -1.0), candidate.entries - neurons)
    rows = torch.arange(neurons, device=scores.device)
    positions = torch.cat([rows * inputs + first[:, 0], others]).sort().values
    chosen = torch.div(positions, inputs, rounding_mode="floor")
    return positions - chosen * inputs, torch.bincount(chosen, minlength=neurons)
