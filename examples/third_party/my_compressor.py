"""``descentlab run crossed compressor=my_compressor:HalfPrecision``: gradients travel as 16-bit floats."""

import torch

from descentlab.core.protocols import Mean


class HalfPrecision:
    """What rounding takes away stays with the worker and is added to its next gradient (error feedback)."""

    def start(self, params, workers, streams, replicates):
        residual = {k: p.new_zeros(p.shape[0], workers, *p.shape[1:]) for k, p in params.items()}
        return residual, {}  # one for each worker; nothing that all workers share

    def exchange(self, grads, memory, shared):
        mean, residual = {}, {}
        for name, g in grads.items():
            owed = g + memory[name]
            sent = owed.to(torch.float16)
            mean[name] = (yield Mean(sent)).to(g.dtype)
            residual[name] = owed - sent.to(g.dtype)
        return mean, residual, shared

    def resize(self, shared, rank, streams):
        return shared  # no rank to change
