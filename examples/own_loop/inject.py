"""One wrong step in your own loop: sixteen outputs of a layer become 1e12, and the elements that did."""

import torch

import descentlab as dl

model = torch.nn.Sequential(torch.nn.Linear(36, 32), torch.nn.SiLU(), torch.nn.Linear(32, 10))
x, y = torch.randn(64, 36), torch.randint(10, (64,))
with dl.inject(model, layer="0", elements=16, value=1e12, seed=0) as hits:
    loss = torch.nn.functional.cross_entropy(model(x), y)
loss.backward()
print(f"loss {loss:.3g} nats; elements {hits[0].index[0]} to {hits[0].index[-1]}: {hits[0].old[0]:.3g} -> 1e12")
