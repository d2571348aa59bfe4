"""The Hessian of a model and a loss of your own, and whether a learning rate is stable on it."""

import torch

import descentlab as dl

model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
x, y = torch.randn(128, 6), torch.randint(3, (128,))
matrix = dl.hessian(model, torch.nn.functional.cross_entropy, (x, y))
largest = float(torch.linalg.eigvalsh(matrix)[-1])
print(f"{tuple(matrix.shape)}, largest eigenvalue {largest:.4f}: gradient descent needs lr < {2 / largest:.3f}")
