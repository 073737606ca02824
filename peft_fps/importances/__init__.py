"""How a weight is scored: every importance in a module of its own.

Config, command line, calibration, records and reports read this table; an importance that is added here is known
everywhere. What several share stands in `backward` (one pass with gradients) and `short_training`.
"""

from peft_fps.importances.activation import ACTIVATION
from peft_fps.importances.fisher import FISHER
from peft_fps.importances.gradient import GRADIENT
from peft_fps.importances.importance import Evidence, Gathering, Importance, Request, Score
from peft_fps.importances.l0 import L0
from peft_fps.importances.magnitude import MAGNITUDE
from peft_fps.importances.movement import MOVEMENT
from peft_fps.importances.random import RANDOM
from peft_fps.importances.sensitivity import SENSITIVITY


IMPORTANCES: dict[str, Importance] = {
    importance.name: importance
    for importance in (ACTIVATION, MAGNITUDE, RANDOM, GRADIENT, FISHER, SENSITIVITY, MOVEMENT, L0)
}

WITHOUT_DATA = tuple(name for name, importance in IMPORTANCES.items() if importance.needs == "nothing")
"""Names of importances that need no data."""

__all__ = ["IMPORTANCES", "WITHOUT_DATA", "Evidence", "Gathering", "Importance", "Request", "Score"]
