"""The life of an adapter on a base in 4 bit, on a CUDA device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_fps import FPSConfig
from tests.support.helpers import tokens
from tests.support.quantised_bases import plain_bert, quantised


@pytest.mark.cuda
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device; python -m tests.cuda runs what needs one, and other tests there",
)
@pytest.mark.filterwarnings("ignore:Merging lost")
def test_calibrate_train_save_load_and_merge(tmp_path: Path) -> None:
    with torch.device("cuda"):
        base = plain_bert()
        model: Any = get_peft_model(quantised("4bit", base), FPSConfig(budget=0.02))
        batch = {"input_ids": tokens(6, 8), "labels": torch.arange(6) % 3}
        assert model.calibrate([batch], progress=False).trained > 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, losses = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0), []
        for _ in range(10):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            expected = model.eval()(**batch).logits
            loaded: Any = PeftModel.from_pretrained(quantised("4bit", base), tmp_path).eval()
            torch.testing.assert_close(loaded(**batch).logits, expected)
            merged = loaded.merge_and_unload()(**batch).logits
    assert merged.is_cuda
    assert (merged - expected).norm() < 0.3 * expected.norm()  # the merged weights are rounded to 4 bits anew
