"""What users of transformers and peft do with a run: `load` gives their model, which saves itself as their libraries do."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import environment

import dist_train
from dist_train import train
from dist_train.tasks import generate

HERE = Path(__file__).parent
TOKENS = torch.arange(24).view(3, 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The loaded models of two short runs: a GPT-2, and one of which peft trained adapters."""
    pytest.importorskip("peft", reason="needs pip install -e '.[zoo]'")
    home = tmp_path_factory.mktemp("after")
    found = {}
    for user in ("gpt2", "lora"):
        train(str(HERE / f"{user}.yaml"), f"run.dir={home}", "trainer.duration=2step")
        found[user] = dist_train.load(home / user)
    return found


def fresh(folder: Path, *lines: str) -> torch.Tensor:
    """The logits of a process that has transformers and peft, but nothing of ours."""
    program = ["import torch", "from transformers import AutoModelForCausalLM", *lines]
    program += ["with torch.no_grad(): logits = model.eval()(torch.arange(24).view(3, 8)).logits"]
    program += ["import sys; assert 'dist_train' not in sys.modules", "torch.save(logits, 'logits.pt')"]
    subprocess.run([sys.executable, "-P", "-c", "\n".join(program)], cwd=folder, env=environment(), check=True)
    return torch.load(folder / "logits.pt", weights_only=True)


def test_a_model_of_transformers_saves_what_from_pretrained_reads(models: dict[str, Any], tmp_path: Path) -> None:
    model = models["gpt2"]
    model.save_pretrained(tmp_path / "saved")
    found = fresh(tmp_path, "model = AutoModelForCausalLM.from_pretrained('saved')")
    with torch.no_grad():
        torch.testing.assert_close(found, model(TOKENS).logits)
        untrained = type(model)(model.config).eval()(TOKENS).logits
    assert not torch.allclose(found, untrained, atol=1e-3)


def test_adapters_of_peft_are_saved_alone_and_read_onto_their_base(models: dict[str, Any], tmp_path: Path) -> None:
    model = models["lora"]
    model.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters/adapter_model.safetensors").stat().st_size < 10_000
    base = copy.deepcopy(model).unload()
    base.save_pretrained(tmp_path / "base")
    found = fresh(
        tmp_path,
        "from peft import PeftModel",
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('base'), 'adapters')",
    )
    with torch.no_grad():
        torch.testing.assert_close(found, model(TOKENS).logits)
        assert not torch.allclose(found, base(TOKENS).logits, atol=1e-3)


def test_our_generate_finds_the_tokens_that_transformers_own_finds(models: dict[str, Any]) -> None:
    model = models["gpt2"]
    own = model.generate(
        TOKENS,
        attention_mask=torch.ones_like(TOKENS),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert torch.equal(generate(model, TOKENS, 6, temperature=0), own)
