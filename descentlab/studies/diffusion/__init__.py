"""SGD as a discrete diffusion: clouds of runs around one point, and a theory that predicts every direction."""
