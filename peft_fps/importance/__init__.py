"""The scores of weights, one module for each importance.

The config, the command line, calibration, records and reports read the table `IMPORTANCES`. Calibration calls an
importance's `gather` for evidence; `scorer.scorer` turns the evidence of a layer into scores.

| module | subject |
|---|---|
| `importance` | `Importance`, what each of them is |
| `activation`, `magnitude`, `random` | scores from inputs, from weights alone, and from a seed |
| `gradient`, `fisher`, `sensitivity` | scores from backward passes |
| `movement`, `l0` | scores from a short training that is undone |
| `gradient_sums`, `short_training` | code that several of them share: backward passes, short training |
| `scorer` | the scores of one layer by the importance of a config |
| `settings` | the fields of `FPSConfig` that importances read |
"""

from peft_fps.importance.activation import ACTIVATION
from peft_fps.importance.fisher import FISHER
from peft_fps.importance.gradient import GRADIENT
from peft_fps.importance.importance import Evidence, Gathering, Importance, Request, Score
from peft_fps.importance.l0 import L0
from peft_fps.importance.magnitude import MAGNITUDE
from peft_fps.importance.movement import MOVEMENT
from peft_fps.importance.random import RANDOM
from peft_fps.importance.sensitivity import SENSITIVITY
from peft_fps.importance.settings import Settings


IMPORTANCES: dict[str, Importance] = {
    importance.name: importance
    for importance in (ACTIVATION, MAGNITUDE, RANDOM, GRADIENT, FISHER, SENSITIVITY, MOVEMENT, L0)
}

WITHOUT_DATA = tuple(name for name, importance in IMPORTANCES.items() if importance.needs == "nothing")
"""Names of importances that need no data."""

__all__ = ["IMPORTANCES", "WITHOUT_DATA", "Evidence", "Gathering", "Importance", "Request", "Score", "Settings"]
