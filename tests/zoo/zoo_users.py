"""The loop of each user of test_other_peoples_code.py: what they would have written by hand; by the name of the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import schedulefree
import segmentation_models_pytorch
import timm
import torch
import zoo_dense as dense
import zoo_generative as generative
import zoo_language as language
import zoo_streams as streams
import zoo_vision as vision
from torch import nn
from torch.nn import functional
from zoo_plain import plain_loop
from zoo_streams import write_tars

__all__ = ["PLAIN", "write_tars"]


def timm_vit() -> Any:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        still = [n.endswith(".bias") or n in ("cls_token", "pos_embed") for n, _ in model.named_parameters()]
        decayed = [p for p, no in zip(model.parameters(), still, strict=True) if not no]
        others = [p for p, no in zip(model.parameters(), still, strict=True) if no]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05, fused=True)

    return plain_loop(
        lambda: timm.create_model("test_vit", img_size=32, num_classes=2, drop_path_rate=0.1),
        vision.Pictures(24, is_training=True, auto_augment="rand-m5-mstd0.5", re_prob=0.25, color_jitter=0.4),
        lambda model, batch: (
            functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1, reduction="sum"),
            4,
        ),
        optimizer,
        mix=timm.data.Mixup(0.8, 1.0, num_classes=2),
        schedule_of=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=6),
    )


def hf_vit() -> Any:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        found = schedulefree.AdamWScheduleFree(model.parameters(), lr=3e-3)
        found.train()
        return found

    return plain_loop(
        vision.hf_vit,
        vision.Pictures(24, is_training=True),
        lambda model, batch: (functional.cross_entropy(model(batch[0]).logits, batch[1], reduction="sum"), 4),
        optimizer,
    )


def nano() -> Any:
    def loss_of(model: nn.Module, batch: Any) -> Any:
        return model(*batch)[1] * batch[1].numel(), batch[1].numel()

    return plain_loop(language.NanoGPT, language.Windows(24), loss_of, adamw)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)


def hf_loss(model: nn.Module, batch: Any) -> Any:
    count = (batch["labels"][:, 1:] != -100).sum()
    return model(**batch).loss * count, count


def gpt2(build: Callable[[], nn.Module] = language.gpt2) -> Any:
    return plain_loop(build, language.lines(24), hf_loss, adamw, collate=language.pad, clip=0.5)


def lora() -> Any:
    return gpt2(language.lora)


def unet() -> Any:
    def loss_of(model: nn.Module, batch: Any) -> Any:
        images, masks = batch
        return functional.cross_entropy(model(images), masks, ignore_index=255, reduction="sum"), (masks != 255).sum()

    return plain_loop(
        lambda: segmentation_models_pytorch.Unet(
            "timm-mobilenetv3_small_minimal_100", 3, None, decoder_channels=[16, 8, 8], classes=3
        ),
        dense.Masks(24),
        loss_of,
        lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True),
    )


def detection() -> Any:
    return plain_loop(
        dense.small_rcnn,
        dense.Boxes(24),
        lambda model, batch: (sum(model(list(batch[0]), list(batch[1])).values()) * 4, 4),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, fused=True),
        collate=dense.pairs,
    )


def vae() -> Any:
    return plain_loop(
        generative.VAE,
        generative.Digits(24),
        lambda model, batch: generative.ELBO().step(model, batch)[:2],
        lambda model: torch.optim.Adam(model.parameters(), lr=1e-3, fused=True),
    )


def gan() -> Any:
    def optimizer(model: Any) -> torch.optim.Optimizer:
        groups = [{"params": model.G.parameters()}, {"params": model.D.parameters(), "lr": 4e-4}]
        return torch.optim.Adam(groups, lr=2e-4, betas=(0.5, 0.999), fused=True)

    return plain_loop(generative.GAN, generative.Digits(24), generative.OneStepGAN().step, optimizer)


def web() -> Any:
    def loss_of(model: nn.Module, batch: Any) -> Any:
        return (model(batch[0]).squeeze(1) - batch[1].float()).pow(2).sum(), 4

    return plain_loop(
        lambda: nn.Linear(8, 1),
        streams.SelfSplit(),
        loss_of,
        lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True),
    )


PLAIN = {f.__name__: f for f in (timm_vit, hf_vit, nano, gpt2, lora, unet, detection, vae, gan, web)}
PLAIN |= {"hf_stream": web, "self_split": web}
