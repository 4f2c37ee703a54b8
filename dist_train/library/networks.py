"""Small networks for the ready tasks (`dist_train.tasks`): a language model, a U-Net, a detector, a VAE and a GAN."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class GPT(nn.Module):
    """A decoder-only transformer as GPT-2 (Radford et al. 2019): tokens int64 (N, T) -> logits (N, T, vocabulary).

    Pre-norm blocks, learned positions, GELU, and the embedding as the last layer.

    Args:
        vocabulary: number of tokens. length: the most tokens of a forward.
        width: of the embedding; heads: that it is split into; layers: blocks.
        dropout: probability, after attention and MLP.
    """

    def __init__(
        self, vocabulary: int, length: int, width: int = 64, heads: int = 4, layers: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.length = length
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Raises ValueError: there are more tokens than `length`."""
        if tokens.shape[1] > self.length:
            raise ValueError(f"GPT: expected at most {self.length} tokens, found {tokens.shape[1]}")
        hidden = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a LayerNorm and beside a residual connection: (N, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"GPT: expected a width that {heads} heads divide, found {width}")
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(hidden)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        hidden = hidden + self.dropout(self.out(mixed))
        return hidden + self.dropout(self.mlp(self.norm2(hidden)))


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al. 2015): (N, channels, H, W) -> logits (N, classes, H, W); H and W multiples of 4.

    Args:
        channels: of the images. classes: of a pixel. width: channels of the first level; doubled at each of two more.
    """

    def __init__(self, channels: int = 3, classes: int = 2, width: int = 16) -> None:
        super().__init__()
        one, two, three = width, 2 * width, 4 * width
        self.down1, self.down2, self.bottom = _double(channels, one), _double(one, two), _double(two, three)
        self.up2, self.up1 = _double(three + two, two), _double(two + one, one)
        self.head = nn.Conv2d(one, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.down1(images)
        second = self.down2(functional.max_pool2d(first, 2))
        lowest = self.bottom(functional.max_pool2d(second, 2))
        second = self.up2(torch.cat([functional.interpolate(lowest, scale_factor=2.0), second], 1))
        return self.head(self.up1(torch.cat([functional.interpolate(second, scale_factor=2.0), first], 1)))


def _double(channels: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inside in (channels, width):
        layers += [nn.Conv2d(inside, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU()]
    return nn.Sequential(*layers)


def small_faster_rcnn(classes: int = 3, size: int = 32, width: int = 32) -> nn.Module:
    """torchvision's Faster R-CNN (Ren et al. 2015) on a body of four convolutions, for small images on a CPU.

    Args:
        classes: with the background, which is class 0.
        size: of the images in pixels. width: channels of the body's last layers.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    layers: list[nn.Module] = []
    for inside, out, stride in ((3, width // 2, 1), (width // 2, width, 2), (width, width, 2), (width, width, 1)):
        layers += [nn.Conv2d(inside, out, 3, stride, padding=1), nn.GroupNorm(4, out), nn.ReLU()]
    body = nn.Sequential(*layers)
    body.out_channels = width  # type: ignore[assignment]  # FasterRCNN reads it
    return FasterRCNN(
        body, min_size=size, max_size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3,
        rpn_anchor_generator=AnchorGenerator(((size // 4, size // 3, size // 2),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 5, 2), box_head=TwoMLPHead(width * 25, 64),
        box_predictor=FastRCNNPredictor(64, classes), rpn_pre_nms_top_n_train=100, rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=20, rpn_batch_size_per_image=64,
        box_batch_size_per_image=32, box_detections_per_img=10,
    )  # fmt: skip


class DigitsVAE(nn.Module):
    """Images (N, 1, 8, 8) -> (logits of the reconstruction (N, 1, 8, 8), mean (N, latent), log variance (N, latent)).

    In train mode the code is drawn, in eval mode it is the mean.
    """

    def __init__(self, latent: int = 8, width: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(
            nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, 64), nn.Unflatten(1, (1, 8, 8))
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(images).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return self.decoder(code), mean, log_variance


class DigitsGAN(nn.Module):
    """A generator, noise (N, latent) -> images (N, 1, 8, 8) in [0, 1], and a discriminator, images -> logits (N, 1)."""

    def __init__(self, latent: int = 16, width: int = 128) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64), nn.Sigmoid(),
            nn.Unflatten(1, (1, 8, 8)),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)
