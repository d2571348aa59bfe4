"""A model of one's own. descentlab run crossed model=my_model:Sines dataset=my_dataset:spirals"""

import torch
from torch import Tensor, nn


class Sines(nn.Module):
    """``[B, 2]`` -> ``[B, 2]``: one hidden layer of sines."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sin(3.0 * self.first(x)))
