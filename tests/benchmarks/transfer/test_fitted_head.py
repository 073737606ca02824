"""Training that starts from the head that is fitted to the frozen features."""

from peft_fps.benchmarks.transfer import cell_run
from peft_fps.benchmarks.transfer.cells import Cell


def test_a_fitted_head_is_what_training_starts_from(setting, monkeypatch):
    monkeypatch.setattr(cell_run, "train", lambda *arguments, **options: 0.0)
    linear, *untrained = (
        cell_run.run_cell(Cell("bright", name, share, 0, rate), setting)
        for name, share, rate in [("linear", None, None), ("try-fitted-head", 0.2, 1e-2), ("try-clip", 0.2, 1e-2)]
    )
    fitted, random = ((record.validation, record.test) for record in untrained)
    assert fitted == (linear.validation, linear.test) != random
