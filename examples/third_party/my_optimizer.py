"""``descentlab run recovery optimizer=my_optimizer:SignDescent optimizer.lr=1e-3``: every weight moves by lr."""

import torch


class SignDescent(torch.optim.Optimizer):
    """theta -= lr * sign(momentum-averaged gradient)."""

    def __init__(self, params, lr=1e-3, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                held = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                held.lerp_(p.grad, 1 - group["momentum"])
                p.sub_(group["lr"] * held.sign())
