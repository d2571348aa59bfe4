"""A decoder-only transformer in the manner of nanoGPT (A. Karpathy), small enough for dense Hessians.

Attention is written out (no fused kernel): it can be differentiated twice and vectorised over members.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import UserError
from ..base import Data, ModelFactory
from .fit import tokens

INITIAL_STD = 0.02  # of every linear and embedding weight


class Attention(nn.Module):
    """Causal self-attention ``[B, T, width]`` -> ``[B, T, width]``; no biases."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.drop_out = nn.Dropout(dropout) if dropout else nn.Identity()

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where every position looks, ``[B, heads, T, T]`` with a query in a row, and the values of the heads."""
        length, width = x.shape[-2:]
        split = self.qkv(x).unflatten(-1, (3, self.heads, width // self.heads))
        q, k, v = (part.transpose(-3, -2) for part in split.unbind(-3))
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(later, -math.inf).softmax(-1), v

    def forward(self, x: Tensor) -> Tensor:
        weights, v = self.weights(x)
        return self.drop_out(self.out((self.drop(weights) @ v).transpose(-3, -2).flatten(-2)))


class Block(nn.Module):
    """Normalise, attend, add; normalise, two linear layers with GELU, add."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.first, self.second = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.drop(self.second(F.gelu(self.first(self.norm2(x)))))


class NanoGPT(nn.Module):
    """Token ids ``[B, T]``, T at most ``block`` -> logits ``[B, T, vocabulary]`` of the token after each."""

    def __init__(
        self, vocabulary: int, block: int, width: int, heads: int, layers: int, hidden: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.block = block
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(block, width)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INITIAL_STD)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[-1]
        if length > self.block:
            raise ValueError(f"{length} tokens, at most {self.block} fit")
        places = self.position(torch.arange(length, device=ids.device))
        return self.head(self.norm(self.blocks(self.drop(self.token(ids) + places))))

    @torch.no_grad()
    def generate(self, ids: Tensor, length: int, *, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """``ids`` int64 ``[B, T]``, T >= 1 of any length, followed by ``length`` tokens drawn one by one.

        Each is drawn from softmax(logits / ``temperature``), 0 = the most probable; the model sees the last ``block``
        tokens at most. Draws depend on ``seed`` alone.

        Raises:
            ValueError: for an empty context or a negative temperature.
        """
        if ids.shape[-1] < 1 or temperature < 0:
            raise ValueError("expected at least one token of context and a temperature of at least 0")
        generator = torch.Generator(ids.device).manual_seed(seed)
        training = self.training
        self.eval()
        for _ in range(length):
            logits = self(ids[:, -self.block :])[:, -1]
            if temperature == 0:
                following = logits.argmax(-1, keepdim=True)
            else:
                following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, following], dim=1)
        self.train(training)
        return ids


def factory(width: int, heads: int, layers: int, hidden: int, dropout: float) -> ModelFactory:
    """Vocabulary and block come from the dataset."""
    if width % heads:
        raise UserError("model.heads", heads, f"a divisor of model.width = {width}")

    def build(data: Data) -> nn.Module:
        vocabulary, block = tokens("nanogpt", data)
        return NanoGPT(vocabulary, block, width, heads, layers, hidden, dropout)

    return ModelFactory(build)
