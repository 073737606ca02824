"""Methods that were tried, did not win, and left the package; their cells stay with the results.

Tables of these cells still need a label, and the method whose learning rate each takes. They ran last in the commit
`LAST_COMMIT`.
"""

LAST_COMMIT = "dcb2433"
"""The last commit of the repository in which these methods run."""

RETIRED: dict[str, tuple[str, str | None]] = {
    "fps-input-rates": ("FPS, rates by input", None),
    **{
        f"try-{score}": (f"try: {score}", "fps")
        for score in ("class-spread", "token-spread", "class-covariance", "weighted-covariance", "output-spread")
    },
    "try-head-rate-tenth": ("try: a tenth of the rate for the head", "fps"),
    "try-fitted-head-tenth": ("try: a fitted head at a tenth of the rate", "fps"),
    "try-clip": ("try: gradients clipped at 1", "fps"),
    "try-beta2": ("try: beta2 0.98", "fps"),
    "try-beta2-head-rate-tenth": ("try: beta2 0.98, a tenth of the rate for the head", "fps"),
    **{
        f"try-centred-{added}": (f"try: centred inputs, low rates, {label}", "fps-default")
        for added, label in {
            "layer": "layer",
            "block": "block",
            "bottom": "bottom",
            "norm-weights": "weights and biases of norms",
            "scales": "scales",
            "drop-path": "stochastic depth 0.1",
            "decay": "weight decay 0.1",
            "neuron-then-layer": "neuron-then-layer",
            "lift": "lift",
            "lift-activation": "lift-activation",
            "ria": "ria",
            "owl": "owl",
            "alpha": "alpha",
            "output-gradient": "output-gradient",
            "output-gradient-layer": "output-gradient-layer",
        }.items()
    },
}
"""Label and `tuned_as` of `Arm` by name; None: it has learning rates of its own."""
