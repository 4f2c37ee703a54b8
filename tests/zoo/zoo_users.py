"""The loop of each user of test_other_peoples_code.py: what they would have written by hand; by the name of the config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import schedulefree
import segmentation_models_pytorch
import timm
import timm.optim
import torch
import transformers
import zoo_dense as dense
import zoo_generative as generative
import zoo_language as language
import zoo_streams as streams
import zoo_vision as vision
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler as lrs
from torch.utils.data import default_collate
from zoo_plain import BATCH, STEPS, plain_loop, read
from zoo_streams import write_tars

from dist_train.data.plan import Plan

__all__ = ["PLAIN", "PRETRAINED", "READ", "write_tars"]


def timm_vit() -> Any:
    def optimizer(model: Any) -> torch.optim.Optimizer:
        groups = timm.optim.param_groups_layer_decay(model, 0.05, ["cls_token", "pos_embed"], layer_decay=0.75)
        found = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05, fused=True)
        found.register_step_pre_hook(lambda *_: scale(found, 1.0))
        found.register_step_post_hook(lambda *_: scale(found, -1.0))
        return found

    def scale(optimizer: torch.optim.Optimizer, power: float) -> None:
        """As timm's schedulers do, so that a schedule of torch keeps the layers' ratio."""
        for group in optimizer.param_groups:
            if power > 0:
                group["of_schedule"] = group["lr"]
            group["lr"] = group["of_schedule"] * (group["lr_scale"] if power > 0 else 1.0)

    return plain_loop(
        lambda: timm.create_model("test_vit", img_size=32, num_classes=2, drop_path_rate=0.1),
        vision.Pictures(24, is_training=True, auto_augment="rand-m5-mstd0.5", re_prob=0.25, color_jitter=0.4),
        lambda model, batch: (timm.loss.SoftTargetCrossEntropy()(model(batch[0]), batch[1]) * 4, 4),
        optimizer,
        mix=timm.data.Mixup(0.8, 1.0, num_classes=2),
        schedule_of=lambda optimizer: lrs.OneCycleLR(optimizer, 2e-3, total_steps=6),
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
        balanced=True,
    )


def nano() -> Any:
    def loss_of(model: nn.Module, batch: Any) -> Any:
        return model(*batch)[1] * batch[1].numel(), batch[1].numel()

    return plain_loop(language.NanoGPT, language.Windows(24), loss_of, adamw)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)


def hf_loss(model: nn.Module, batch: Any) -> Any:
    """transformers' own, which gives a sum when it is told that the global batch has one token."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return model(**batch, labels=labels, num_items_in_batch=1).loss, (labels[:, 1:] != -100).sum()


def warm_cosine(optimizer: torch.optim.Optimizer) -> Any:
    """Two steps of warm-up, and four of a cosine."""
    parts = [lrs.LinearLR(optimizer, 1 / 3, total_iters=2), lrs.CosineAnnealingLR(optimizer, 4)]
    return lrs.SequentialLR(optimizer, parts, milestones=[2])


def gpt2(build: Callable[[], nn.Module] = language.gpt2) -> Any:
    collate = transformers.DataCollatorWithPadding(language.tokenizer())
    return plain_loop(build, language.lines(24), hf_loss, adamw, collate=collate, clip=0.5, schedule_of=warm_cosine)


def lora() -> Any:
    return gpt2(language.lora)


def small_unet() -> nn.Module:
    return segmentation_models_pytorch.Unet(
        "timm-mobilenetv3_small_minimal_100", 3, None, decoder_channels=[16, 8, 8], classes=3
    )


def unet() -> Any:
    def loss_of(model: nn.Module, batch: Any) -> Any:
        images, masks = batch
        return functional.cross_entropy(model(images), masks, ignore_index=255, reduction="sum"), (masks != 255).sum()

    return plain_loop(
        small_unet,
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
        collate=lambda samples: tuple(zip(*samples, strict=True)),  # torchvision's utils.collate_fn
    )


def vae() -> Any:
    def loss_of(model: nn.Module, batch: Any) -> Any:
        outputs, mean, log_variance = model(batch[0])
        kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum()
        return functional.mse_loss(outputs, batch[0], reduction="sum") / 2 + kl, 4

    return plain_loop(
        generative.VAE,
        generative.Digits(24),
        loss_of,
        lambda model: torch.optim.Adam(model.parameters(), lr=1e-3, fused=True),
    )


def gan() -> Any:
    def fake(model: Any, batch: Any) -> Any:
        return model.generator(torch.randn(len(batch[0]), 8))

    def critics(model: Any, batch: Any) -> Any:
        real, made = model.discriminator(batch[0]), model.discriminator(fake(model, batch).detach())
        return functional.softplus(-real).sum() + functional.softplus(made).sum(), 4

    def generators(model: Any, batch: Any) -> Any:
        return functional.softplus(-model.discriminator(fake(model, batch))).sum(), 4

    def optimizers(model: Any) -> list[torch.optim.Optimizer]:
        pairs = (model.discriminator, 4e-4), (model.generator, 2e-4)
        return [torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.999), fused=True) for net, lr in pairs]

    return plain_loop(generative.GAN, generative.Digits(24), [critics, generators], optimizers)


def simclr() -> Any:
    """The loss of the whole batch of eight, in one forward."""
    data, plan, losses = generative.TwoViews(24), Plan(0, 24, BATCH), []
    torch.manual_seed(0)
    model = generative.Encoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    samples = read(data, plan)
    for _ in range(STEPS):
        (one, other), _ = default_collate([next(samples) for _ in range(BATCH)])
        codes = functional.normalize(model(torch.cat([one, other])))
        likeness = (codes @ codes.T / 0.2).fill_diagonal_(float("-inf"))
        loss = functional.cross_entropy(likeness, (torch.arange(2 * BATCH) + BATCH) % (2 * BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def web() -> Any:
    def loss_of(model: nn.Module, batch: Any) -> Any:
        return (model(batch[0]).squeeze(1) - batch[1].float()).pow(2).sum(), 4

    return plain_loop(
        lambda: nn.Linear(8, 1),
        streams.SelfSplit(),
        loss_of,
        lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True),
    )


PLAIN = {f.__name__: f for f in (timm_vit, hf_vit, nano, gpt2, lora, unet, detection, vae, gan, simclr, web)}
PLAIN |= {"hf_stream": web, "self_split": web}


def restored(build: Callable[[], nn.Module]) -> Callable[[Path], nn.Module]:
    """In plain torch."""

    def read(path: Path) -> nn.Module:
        model = build()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model

    return read


PRETRAINED = {"hf_vit": transformers.ViTForImageClassification.from_pretrained}
READ: dict[str, Callable[[Path], nn.Module]] = {
    "timm_vit": lambda path: timm.create_model("test_vit", img_size=32, num_classes=2, checkpoint_path=str(path)),
    "nano": restored(language.NanoGPT),
    "unet": restored(small_unet),
    "detection": restored(dense.small_rcnn),
    "vae": restored(generative.VAE),
    "gan": restored(generative.GAN),
    "simclr": restored(generative.Encoder),
}
