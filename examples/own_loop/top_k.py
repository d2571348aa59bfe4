"""The three largest Hessian eigenvalues of a model too large for the matrix (22,510 parameters)."""

import torch

import descentlab as dl

model = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.Tanh(), torch.nn.Linear(300, 10))
x, y = torch.randn(256, 64), torch.randint(10, (256,))
top = dl.top_k(model, torch.nn.functional.cross_entropy, (x, y), 3, tolerance=1e-4)
for value, residual in zip(top.values, top.residuals, strict=True):
    print(f"{value:.5f} (residual {residual:.1e})")
