"""The spectrum of a Hessian, its trace and the noise of its gradients, without and with the matrix."""

import torch

import descentlab as dl

model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.SiLU(), torch.nn.Linear(24, 10))
loss, data = torch.nn.functional.cross_entropy, (torch.randn(128, 16), torch.randint(10, (128,)))
density = dl.spectral_density(model, loss, data, probes=4, steps=30)
value, error, _ = dl.trace(model, loss, data)
print(f"trace {value:.4f} +- {error:.4f}; by quadrature {density.moment(1)[0]:.4f} +- {density.moment(1)[1]:.4f}")
noise = dl.gradient_covariance(model, loss, data)
print(f"trace of the gradient noise {noise.covariance.trace():.4f} over {noise.samples} samples")
