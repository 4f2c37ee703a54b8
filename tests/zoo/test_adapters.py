"""peft's adapters in checkpoints that leave the base out, and `transfer` on top of peft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_train import load, train
from dist_train.config.errors import ConfigError
from dist_train.models.transfer import find_head

language = pytest.importorskip("zoo_language", reason="needs pip install -e '.[zoo]'")

HERE = Path(__file__).parent


def run(folder: Path, name: str, *overrides: str) -> Path:
    train(str(HERE / "lora.yaml"), f"run.name={name}", f"run.dir={folder}", *overrides)
    return folder / name


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_a_run_without_its_base_resumes_and_loads_as_a_whole_one(tmp_path: Path) -> None:
    import peft

    whole = run(tmp_path, "whole", "checkpoint.what=all")
    for stop in ("4step", "null"):
        adapters = run(tmp_path, "adapters", f"trainer.stop_at={stop}")
    model = load(adapters)
    assert isinstance(model, peft.PeftModel)
    assert same(model, load(whole))
    saved = torch.load(adapters / "model.pt", weights_only=True)
    assert [name for name in saved if ".lora_" not in name] == []
    assert len(saved) == 4, "two matrices in each of two layers"
    torch.manual_seed(0)
    plain = language.lora()
    plain.load_state_dict(saved, strict=False)
    assert same(plain, model)
    model.save_pretrained(tmp_path / "peft")  # as peft's users hand them on
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(language.gpt2(), tmp_path / "peft")
    assert same(again, model)


def test_a_base_models_file_is_loaded_under_the_adapters(tmp_path: Path) -> None:
    torch.manual_seed(5)
    base = language.gpt2()
    torch.save(base.state_dict(), tmp_path / "base.pt")
    options = [f"transfer.weights={tmp_path / 'base.pt'}", "checkpoint.what=trained", "trainer.stop_at=4step"]
    for name in ("run", "run"):
        found = run(tmp_path, name, *options)
    inside = load(found).unload()  # peft's: the base model without its adapters
    assert same(inside, base)
    torch.save({**base.state_dict(), "transformer.wpe.weight": torch.zeros(16, 16)}, tmp_path / "base.pt")
    with pytest.raises(
        ConfigError, match=r"transfer.weights: .* but base_model.model.transformer.wpe.weight is another one"
    ):
        run(tmp_path, "run", *options[:2])
    del base.transformer.h[1]
    torch.save(base.state_dict(), tmp_path / "base.pt")
    with pytest.raises(
        ConfigError, match=r"transformer.h.1.attn.c_attn.base_layer.weight +\(16, 48\) +- +not in the file"
    ):
        run(tmp_path, "other", *options)


def test_patterns_and_heads_of_transfer_know_adapters_from_layers(tmp_path: Path) -> None:
    import peft

    first = "base_model.model.transformer.h.0.*"
    found = run(tmp_path, "frozen", f"transfer.freeze=['{first}']", "checkpoint.what=trained", "trainer.duration=2step")
    assert {name.split(".h.")[1][0] for name in torch.load(found / "model.pt", weights_only=True)} == {"1"}
    on_head = peft.get_peft_model(language.gpt2(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    assert [find_head(model) for model in (language.lora(), on_head)] == [
        "base_model.model.lm_head",
        "base_model.model.lm_head.base_layer",
    ]
