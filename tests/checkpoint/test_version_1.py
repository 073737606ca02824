"""Files that a peft_fps of format version 1 wrote: `version_1/write.py` wrote them, with their outputs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor

from peft_fps import FPSConfig, Selection, hotswap_adapter
from peft_fps.checkpoint.record import AdapterRecord
from peft_fps.layers.lookup import entry_layers
from peft_fps.selection.module_sizes import ModuleSizes
from tests.checkpoint.version_1.encoder import Encoder
from tests.support.helpers import layers_of


FILES = Path(__file__).parent / "version_1"
FOLDERS = {"default": FILES, "other": FILES / "other", "both": FILES / "both"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FLAT = {"allocation", "calibration", "base_fingerprint", "whole_tensors", "tensors_sha256", "pickled"}
SAVED = load_file(FILES / "outputs.safetensors")
UNREACHED = "ignore:1 of 7 modules saw no input"


def encoder() -> Encoder:
    model = Encoder().eval()
    model.load_state_dict(
        {name.removeprefix("base."): tensor for name, tensor in SAVED.items() if name.startswith("base.")}
    )
    return model


def computes(model: Any, adapter: str) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(SAVED["x"]), SAVED[f"output.{adapter}"])


def data() -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(12) % 3
    return [(SAVED["x"][:6], labels[:6]), (SAVED["x"][6:], labels[6:])]


def content(name: str) -> dict[str, Any]:
    return json.loads((FOLDERS[name] / CONFIG).read_text())


def test_the_outputs_differ() -> None:
    with torch.no_grad():
        base = encoder()(SAVED["x"])
    outputs = [base, *(SAVED[f"output.{name}"] for name in FOLDERS)]
    assert all((one - other).abs().max() > 0.01 for one in outputs for other in outputs if one is not other)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_files_are_of_version_1(name: str) -> None:
    assert content(name)["format_version"] == 1
    assert content(name).keys() >= FLAT
    assert "record" not in content(name)


@pytest.mark.parametrize("name", FOLDERS)
def test_an_adapter_computes_what_it_computed(name: str) -> None:
    model = PeftModel.from_pretrained(encoder(), FOLDERS[name]).eval()
    computes(model, name)
    computes(model.merge_and_unload(), name)


def test_several_adapters_load_beside_one_another() -> None:
    model = PeftModel.from_pretrained(encoder(), FILES)
    for name in ("other", "both"):
        model.load_adapter(FOLDERS[name], name)
    for name in FOLDERS:
        model.set_adapter(name)
        computes(model.eval(), name)


def test_a_version_1_adapter_is_swapped_in() -> None:
    model = PeftModel.from_pretrained(encoder(), FILES).eval()
    hotswap_adapter(model, str(FOLDERS["both"]), "default")
    computes(model, "both")
    hotswap_adapter(model, str(FILES), "default")
    computes(model, "default")


@pytest.mark.parametrize("name", FOLDERS)
def test_saving_again_writes_the_present_version(name: str, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(encoder(), FOLDERS[name])
    model.save_pretrained(tmp_path)
    written, old = json.loads((tmp_path / CONFIG).read_text()), content(name)
    assert written["format_version"] == 2
    assert not FLAT & written.keys()
    assert written["record"] == {key: old[key] for key in FLAT}
    kept = old.keys() - FLAT - {"format_version", "peft_version", "auto_mapping"}
    assert {key: written[key] for key in kept} == {key: old[key] for key in kept}
    assert load_file(tmp_path / WEIGHTS).keys() == load_file(FOLDERS[name] / WEIGHTS).keys()
    computes(PeftModel.from_pretrained(encoder(), tmp_path).eval(), name)


def through_a_copy(name: str, folder: Path) -> PeftConfig:
    shutil.copyfile(FOLDERS[name] / CONFIG, folder / CONFIG)
    return PeftConfig.from_pretrained(str(folder))


WAYS: dict[str, Callable[[str, Path], PeftConfig]] = {
    "FPSConfig.from_pretrained": lambda name, folder: FPSConfig.from_pretrained(str(FOLDERS[name])),
    "PeftConfig.from_pretrained": lambda name, folder: PeftConfig.from_pretrained(str(FOLDERS[name])),
    "config alone": through_a_copy,
    "from_peft_type": lambda name, folder: PeftConfig.from_peft_type(**content(name)),
    "constructor": lambda name, folder: FPSConfig(**content(name)),
    "plain data of the present version": lambda name, folder: FPSConfig(
        **json.loads(json.dumps(FPSConfig(**content(name)).to_dict()))
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FOLDERS)
def test_every_way_of_reading_a_config_gives_the_record(way: str, name: str, tmp_path: Path) -> None:
    found, old = WAYS[way](name, tmp_path), content(name)
    assert isinstance(found, FPSConfig)
    record = found.record
    assert isinstance(record, AdapterRecord)
    assert record.allocation == {path: ModuleSizes(**sizes) for path, sizes in old["allocation"].items()}
    assert record.calibration is not None
    assert record.calibration.to_json() == old["calibration"]
    assert record.base_fingerprint == old["base_fingerprint"]
    assert record.whole_tensors == tuple(old["whole_tensors"])
    assert (record.tensors_sha256, record.pickled) == (old["tensors_sha256"], False)


def test_the_record_says_how_the_entries_were_chosen() -> None:
    found = {name: FPSConfig(**content(name)).record.calibration for name in FOLDERS}  # type: ignore[union-attr]
    assert (found["default"].importance, found["default"].norm) == ("activation", "l2")
    assert (found["default"].examples, found["default"].unreached) == (12, ("pooler",))
    assert (found["other"].importance, found["other"].fisher, found["other"].order) == ("fisher", "example", "bottom")
    assert (found["both"].combination, found["both"].adapters) == ("linear", ("default", "other"))
    assert found["both"].weights == (0.5, 1.0)


def test_a_record_binds_the_sizes_in_every_wrapper() -> None:
    sizes = {path: sizes["entries"] for path, sizes in content("default")["allocation"].items()}
    for model in (
        get_peft_model(encoder(), FPSConfig(**content("default"))),
        inject_adapter_in_model(FPSConfig(**content("default")), encoder()),
    ):
        held = {path: layer.sizes("default").entries for path, layer in layers_of(model).items()}
        assert held == sizes


def test_a_config_that_was_saved_alone_stays_open() -> None:
    config = FPSConfig.from_pretrained(str(FILES / "config_alone"))
    assert config.record is None
    assert config == FPSConfig(importance="movement", budget=0.02)


def test_a_pickled_adapter_says_so() -> None:
    record = FPSConfig(**content("other") | {"pickled": True}).record
    assert record is not None
    assert record.pickled


def test_both_forms_together_are_refused() -> None:
    old = content("other")
    with pytest.raises(ValueError, match="record was given beside allocation.*expected one of the two"):
        FPSConfig(**old, record=FPSConfig(**old).record)


# --- the selection --------------------------------------------------------------------------------------------------


def test_a_selection_is_that_of_its_adapter() -> None:
    selection = Selection.load(FILES / "selection.safetensors")
    loaded = Selection.of(PeftModel.from_pretrained(encoder(), FILES))
    assert loaded == Selection.from_adapter(FILES)
    assert loaded.modules == selection.modules
    chosen = {"importance": "activation", "order": "top", "granularity": "neuron"}
    chosen["calibration"] = content("default")["calibration"]
    for found in (loaded, selection):  # the fingerprint of the latter is of the module without data too
        assert {key: found.method[key] for key in chosen} == chosen


@pytest.mark.filterwarnings(UNREACHED)
def test_a_selection_is_what_calibrating_finds_again() -> None:
    options: dict[str, Any] = {"per_neuron": 2, "bias": "with_norms", "modules_to_save": ["classifier"], "norm": "l2"}
    model = get_peft_model(encoder(), FPSConfig(**options))
    model.calibrate(data(), progress=False)
    assert Selection.of(model) == Selection.load(FILES / "selection.safetensors")


def test_a_selection_is_applied() -> None:
    options: dict[str, Any] = {"per_neuron": 2, "bias": "with_norms", "modules_to_save": ["classifier"]}
    model = get_peft_model(encoder(), FPSConfig(**options))
    report = Selection.load(FILES / "selection.safetensors").apply(model)
    assert report.unreached == ("pooler",)
    assert report.method == "weight magnitude x root mean square of the input over 12 examples, granularity neuron"
    expected = PeftModel.from_pretrained(encoder(), FILES)
    for path, layer in entry_layers(layers_of(expected)).items():
        assert torch.equal(layers_of(model)[path].fps_columns["default"], layer.fps_columns["default"])
