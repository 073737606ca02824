"""TRL's trainers with an `FPSConfig`: calibration, then training; the base model stays; saving and loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import LlamaForSequenceClassification

from peft_fps import FPSCallback, FPSConfig, Selection
from tests.calibration.naive_fps import selection_of
from tests.support.helpers import base_bytes, fill, layers_of, selected_columns, tiny_gpt2, tiny_llama, tokens
from tests.support.words import LINES, tokenizer
from tests.training.trainers import QUIET


trl = pytest.importorskip("trl", reason="trl is not installed; pip install trl")

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # renamed in transformers


def pairs() -> list[dict[str, str]]:
    """A prompt with a completion that is preferred and one that is not."""
    return [
        {"prompt": line, "chosen": f" {LINES[(i + 1) % 12]}", "rejected": f" {LINES[(i + 2) % 12]}"}
        for i, line in enumerate(LINES)
    ]


def variety(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


GENERATING: dict[str, Any] = {"num_generations": 2, "max_completion_length": 5}
TRAINERS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "sft": ("SFT", [{"text": line} for line in LINES], {}),
    "dpo": ("DPO", pairs(), {}),
    "kto": ("KTO", [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0}
                    for i, p in enumerate(pairs())], {}),
    "reward": ("Reward", [{"chosen": p["prompt"], "rejected": p["chosen"]} for p in pairs()], {}),
    "grpo": ("GRPO", [{"prompt": line} for line in LINES], GENERATING),
    "rloo": ("RLOO", [{"prompt": line} for line in LINES], GENERATING),
}  # fmt: skip


def trainer(kind: str, folder: Path, model: Any, callbacks: list[Any], config: Any = None, **options: Any) -> Any:
    """A trainer of TRL on a `PeftModel`, or on a model with the config of its adapter."""
    name, examples, own = TRAINERS[kind]
    defaults = QUIET | {"bf16": False, "max_steps": 2, "learning_rate": 0.05}
    defaults |= {"logging_strategy": "steps", "logging_steps": 1}
    rewards = {"reward_funcs": variety} if own else {}
    return getattr(trl, f"{name}Trainer")(
        model,
        args=getattr(trl, f"{name}Config")(str(folder), **(defaults | own | options)),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=callbacks,
        **rewards,
    )


def lines_of(*numbers: int) -> list[torch.Tensor]:
    """Token ids of the lines as the trainer makes them, each alone."""
    vocabulary = tokenizer()
    return [torch.tensor([vocabulary(LINES[number])["input_ids"] + [vocabulary.eos_token_id]]) for number in numbers]


OPTIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "without checkpointing": {"gradient_checkpointing": False},
    "packed": {"packing": True, "max_length": 16},
    "by gradients": {"importance": "gradient"},
    "over the whole model": {"granularity": "model"},
}


@pytest.mark.parametrize("way", OPTIONS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_trains_the_selected_entries_alone_and_saves_and_loads_them(build: Any, way: str, tmp_path: Path) -> None:
    options = dict(OPTIONS[way])
    chosen = {name: options.pop(name) for name in ("importance", "granularity") if name in options}
    run = trainer("sft", tmp_path, build(), [FPSCallback()], FPSConfig(per_neuron=2, **chosen), max_steps=8, **options)
    model = run.model
    assert isinstance(model, PeftModel)
    before, by_magnitude = base_bytes(model), selection_of(model)
    run.train()
    assert "examples" in model.selection_report().method
    assert selection_of(model) != by_magnitude
    assert base_bytes(model) == before
    learned = [layer.fps_values["default"] for layer in layers_of(model).values()]
    assert all(bool(values.any()) for values in learned if values.numel())

    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens()).logits, model.eval()(input_ids=tokens()).logits)
        assert not torch.allclose(build()(input_ids=tokens()).logits, loaded(input_ids=tokens()).logits, atol=1e-3)


def test_the_callback_calibrates_on_the_trainers_own_texts_without_padding(tmp_path: Path) -> None:
    run = trainer("sft", tmp_path, tiny_llama(), [FPSCallback()], FPSConfig(per_neuron=3), max_steps=1)
    run.train()
    other = trainer("sft", tmp_path, tiny_llama(), [], FPSConfig(per_neuron=3)).model
    other.calibrate([{"input_ids": ids} for ids in lines_of(*range(12))], progress=False)
    assert selection_of(run.model) == selection_of(other)


def test_calibration_by_hand_before_training_is_as_good(tmp_path: Path) -> None:
    by_hand, by_callback = (
        trainer("sft", tmp_path, tiny_llama(), callbacks, FPSConfig(per_neuron=2), max_steps=8)
        for callbacks in ([], [FPSCallback()])
    )
    by_hand.model.calibrate(by_hand.get_train_dataloader(), progress=False)
    chosen = selection_of(by_hand.model)
    for run in (by_hand, by_callback):
        run.train()
        assert selection_of(run.model) == chosen
    for path, layer in layers_of(by_hand.model).items():
        assert torch.equal(layer.fps_values["default"], layers_of(by_callback.model)[path].fps_values["default"])


def test_without_calibration_it_says_which_line_to_add(tmp_path: Path) -> None:
    run = trainer("sft", tmp_path, tiny_llama(), [], FPSConfig(per_neuron=2), max_steps=1)
    with pytest.warns(UserWarning, match=r"model\.calibrate\(train_dataloader\).*callbacks=\[FPSCallback\(\)\]"):
        run.train()


# --- further trainers -----------------------------------------------------------------------------------------------


def tiny_reward_model() -> Any:
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 1, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config).eval()


def fresh(kind: str, **options: Any) -> PeftModel:
    base = tiny_reward_model() if kind == "reward" else tiny_llama()
    task = {"task_type": "SEQ_CLS"} if kind == "reward" else {}
    return get_peft_model(base, FPSConfig(**{"per_neuron": 2, **task, **options}))


def logged(run: Any) -> list[dict[str, Any]]:
    """What a trainer has logged, but for the time that it took."""
    timed = ("time", "per_second", "runtime")
    return [
        {k: v for k, v in entry.items() if not any(part in k for part in timed)} for entry in run.state.log_history
    ]


@pytest.mark.parametrize("importance", ["activation", "gradient"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_every_trainer_is_calibrated_and_not_disturbed(kind: str, importance: str, tmp_path: Path) -> None:
    """Training, and all that is logged, are those of a run that starts with the same selection."""
    model = fresh(kind, importance=importance)
    before, by_magnitude = base_bytes(model), selection_of(model)
    run = trainer(kind, tmp_path, model, [FPSCallback(num_batches=2)])
    run.train()
    assert "over 8 examples" in model.selection_report().method or kind in ("dpo", "reward")
    assert selection_of(model) != by_magnitude
    assert base_bytes(model) == before

    other = fresh(kind, importance=importance)
    Selection.of(model).apply(other)
    again = trainer(kind, tmp_path, other, [FPSCallback(num_batches=2)])
    again.train()
    assert logged(run) == logged(again)
    for path, layer in layers_of(other).items():
        assert torch.equal(layer.fps_values["default"], layers_of(model)[path].fps_values["default"])
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == other.get_parameter(name).requires_grad, name


def test_gradients_are_those_of_the_trainers_loss(tmp_path: Path) -> None:
    """DPO starts at its reference, where the loss of a pair is -log σ(β · 0) and its gradient -β/2 of the margin's."""
    model = fresh("dpo", importance="gradient", bias="none")
    run = trainer("dpo", tmp_path, model, [FPSCallback()], beta=0.5)
    batches = list(run.get_train_dataloader())
    run.train()

    plain = tiny_llama()
    for batch in batches:
        kept = batch["completion_mask"][:, 1:]
        logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        chances = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        chosen, rejected = (chances * kept).sum(1).chunk(2)
        (-0.25 * (chosen - rejected)).mean().backward()
    for path, layer in layers_of(model).items():
        best = plain.get_parameter(f"{path}.weight").grad.abs().topk(2).indices.sort().values.tolist()
        assert selected_columns(layer) == best, path


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_inputs_are_those_of_prompts_and_completions_without_padding(kind: str, tmp_path: Path) -> None:
    model = fresh(kind)
    run = trainer(kind, tmp_path, model, [FPSCallback(num_batches=2)])
    seen, loss = [], run.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(inputs)
        return loss(model, inputs, *args, **kwargs)

    run.compute_loss = compute_loss
    run.train()
    texts = [
        torch.cat([ids[mask.bool()], answer[answered.bool()]])[None]
        for inputs in seen[:2]
        for ids, mask, answer, answered in zip(
            *(inputs[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True
        )
    ]
    assert len(texts) == 8
    other = fresh(kind)
    other.calibrate([{"input_ids": ids} for ids in texts], progress=False)
    assert selection_of(model) == selection_of(other)


def test_by_hand_such_batches_are_refused_with_the_remedy(tmp_path: Path) -> None:
    model = fresh("grpo")
    run = trainer("grpo", tmp_path, model, [])
    with pytest.raises(TypeError, match=r"holds 'prompt', but the forward of LlamaForCausalLM takes input_ids.*run="):
        model.calibrate(run.get_train_dataloader(), progress=False)


# --- the reference of a trained adapter -----------------------------------------------------------------------------


def outputs(model: PeftModel, adapter: str = "default") -> torch.Tensor:
    model.set_adapter(adapter)
    with torch.no_grad():
        result = model.eval()(input_ids=tokens()).logits
    model.set_adapter("default")
    return result


@pytest.mark.parametrize("state", ["trained", "loaded"])
@pytest.mark.parametrize("kind", ["dpo", "kto", "rloo"])
def test_the_reference_is_the_adapter_as_at_the_start(kind: str, state: str, tmp_path: Path) -> None:
    model = fresh(kind, granularity="model")
    model.calibrate([{"input_ids": tokens(seed=3)}], progress=False)
    fill(model)
    if state == "loaded":
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", is_trainable=True)
    chosen, start, base = selection_of(model), outputs(model), tiny_llama()(input_ids=tokens()).logits
    run = trainer(kind, tmp_path, model, [FPSCallback()], **({"beta": 0.1} if kind != "dpo" else {}))
    assert torch.equal(outputs(model, "ref"), start)
    run.train()
    assert selection_of(model) == chosen
    assert torch.equal(outputs(model, "ref"), start)
    assert not torch.allclose(outputs(model), start, atol=1e-3)
    assert not torch.allclose(start, base, atol=1e-3)
    if kind != "rloo":
        assert run.state.log_history[0]["rewards/chosen"] == 0.0
    assert run.state.log_history[0].get("kl", 0.0) == 0.0


@pytest.mark.parametrize("importance", ["activation", "gradient"])
def test_the_reference_of_a_new_adapter_is_the_base_model(importance: str, tmp_path: Path) -> None:
    model = fresh("dpo", importance=importance)
    trainer("dpo", tmp_path, model, [FPSCallback()]).train()
    method = model.selection_report("default").method
    assert "12 examples" in method or "24" in method
    torch.testing.assert_close(outputs(model, "ref"), tiny_llama()(input_ids=tokens()).logits.detach())
    assert not torch.allclose(outputs(model), outputs(model, "ref"), atol=1e-4)
