"""Layer-wise lr decay and groups beside timm's own function, and on models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_train.models.depth import depths
from dist_train.optim.optim import build_optimizer

timm = pytest.importorskip("timm", reason="needs pip install -e '.[zoo]'")
optim = pytest.importorskip("timm.optim", reason="needs pip install -e '.[zoo]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[zoo]'")

SMALL = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
def test_a_model_of_timm_has_the_groups_of_timms_own_function(name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def by_name(groups: Any) -> dict[str, tuple[float, float]]:
        return {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}

    theirs = optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
    spec = {
        "_target_": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.7,
        "groups": [{"match": "*", "ndim_below": 2, "weight_decay": 0.0}],
    }  # fmt: skip
    ours = build_optimizer(spec, model, torch.device("cpu")).param_groups
    assert len({scale for scale, _ in by_name(theirs).values()}) > 5
    assert by_name(ours) == by_name(theirs)


@pytest.mark.parametrize(
    ("kind", "sizes", "blocks"),
    [
        ("Bert", SMALL, "encoder.layer.{}."),
        ("ViT", SMALL, "layers.{}."),
        ("GPT2", {"n_embd": 8, "n_layer": 3, "n_head": 2}, "h.{}."),
        ("Llama", {**SMALL, "vocab_size": 16}, "layers.{}."),
    ],
)
def test_a_model_of_transformers_has_a_layer_for_each_block(kind: str, sizes: dict[str, int], blocks: str) -> None:
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))
    found, _ = depths(model)
    first = next(iter(found))
    assert found[first] == 0
    for number in range(3):
        inside = {layer for name, layer in found.items() if blocks.format(number) in f".{name}"}
        assert inside == {number + 1}
    assert max(found.values()) == 4, "the last norm"
