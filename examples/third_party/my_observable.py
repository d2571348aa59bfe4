"""``descentlab run recovery observe.extra=[my_observable:Sparsity]``: how many gradient elements are exactly zero."""

import torch


class Sparsity:
    """Share of zeros in the gradient, and per parameter tensor in a row of columns."""

    name, needs = "sparsity", frozenset({"grad"})

    def measure(self, m):
        zeros = torch.stack([(g == 0).flatten(1).double().mean(1) for g in m.grads.values()], dim=1)
        sizes = torch.tensor([g[0].numel() for g in m.grads.values()], dtype=torch.float64)
        return {"zero_share": zeros @ sizes / sizes.sum(), "zero_share_tensor": zeros}
