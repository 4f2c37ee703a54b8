"""Language models as nanoGPT, transformers and peft have them, on numbers that count up."""

from __future__ import annotations

from typing import Any

import datasets
import tokenizers
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dist_train.tasks import LanguageModel

VOCABULARY = 32


class Windows(torch.utils.data.Dataset[Any]):
    """nanoGPT's get_batch as a dataset: each item a window from anywhere in the text."""

    def __init__(self, n: int, seed: int = 0, block: int = 8, anywhere: bool = True):
        generator = torch.Generator().manual_seed(seed)
        self.text = (torch.arange(512) + torch.randint(0, 2, (512,), generator=generator)) % VOCABULARY
        self.n, self.block, self.anywhere = n, block, anywhere

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        at = int(torch.randint(len(self.text) - self.block - 1, (1,))) if self.anywhere else index * self.block
        window = self.text[at : at + self.block + 1]
        return window[:-1], window[1:]


class NanoGPT(nn.Module):
    """As nanoGPT's: returns (logits, loss), the loss None without targets; the head is the embedding."""

    def __init__(self, d: int = 16):
        super().__init__()
        self.embedding, self.place = nn.Embedding(VOCABULARY, d), nn.Embedding(8, d)
        self.block = nn.TransformerEncoderLayer(d, 2, 2 * d, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(d, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=self.place.weight.dtype)
        embedded = self.embedding(tokens) + self.place(torch.arange(length, device=tokens.device))
        logits = self.head(self.block(embedded, src_mask=mask, is_causal=True))
        return logits, None if targets is None else functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt2(dropout: float = 0.1) -> nn.Module:
    """transformers' GPT-2, small and with random weights."""
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))


def lora() -> nn.Module:
    """The same, of which peft trains adapters only."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1))


def lines(n: int, seed: int = 0) -> datasets.Dataset:
    """A dataset of datasets: lines of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()
    lengths = torch.randint(3, 13, (n,), generator=generator).tolist()
    ids = [[(begin + k) % VOCABULARY for k in range(length)] for begin, length in zip(begins, lengths, strict=True)]
    return datasets.Dataset.from_dict({"input_ids": ids}).with_format("torch")


def tokenizer() -> PreTrainedTokenizerFast:
    """One whose tokens are numbers, for transformers' collators, which ask it how to pad."""
    words = tokenizers.models.WordLevel({str(k): k for k in range(VOCABULARY)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), pad_token="0")


class Naive(LanguageModel):
    """What a user of transformers writes first."""

    def step(self, model: nn.Module, batch: Any) -> Any:
        return model(**batch, labels=batch["input_ids"]).loss
