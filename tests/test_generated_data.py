"""Generated datasets against the formulas they are drawn from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from descentlab.core.errors import UserError
from descentlab.workloads.datasets import gaussian_mixture, mnist1d_like, mnist_similar, teacher_student
from descentlab.workloads.specs import GaussianMixture, Mnist1dLike, Mnist5k, MnistSimilar, TeacherStudent


@pytest.mark.parametrize("cls", [GaussianMixture, TeacherStudent, Mnist1dLike])
def test_a_generated_dataset_depends_on_its_own_seed(cls: type[GaussianMixture]) -> None:
    assert cls(n=7, validation=0, test=5).build().n == (7, 0, 5)
    assert cls(seed=1).build().sha256() != cls().build().sha256()


def test_mnist_similar_has_the_first_two_moments_of_every_class() -> None:
    """Against moments taken anew from the real training images, before the cut to [0, 1]; sampled means within five
    standard errors, the largest variances within 10 %; beyond the rank there is no variance at all. Breaks when classes
    are mixed up, or components are scaled by n - 1 items or not at all."""
    real = Mnist5k().build()
    x, y = mnist_similar.unclipped(20_000, 20, 3)
    for c in (0, 4, 9):
        own = real.x_train[real.y_train == c].flatten(1).double().numpy()
        drawn = x[y == c]
        values, vectors = np.linalg.eigh(np.cov(own.T, bias=True))
        inside = drawn @ vectors
        error = (inside.mean(0) - own.mean(0) @ vectors) / np.sqrt(np.maximum(values, 1e-9) / len(drawn))
        assert np.abs(error[-20:]).max() < 5
        np.testing.assert_allclose(inside[:, -20:].var(0), values[-20:], rtol=0.1)
        assert inside[:, :-20].var(0).max() < 1e-20
    data = MnistSimilar(n=95).build()
    assert data.y_train[:12].tolist() == [*range(10), 0, 1] and data.shape == (1, 28, 28)
    assert float(data.x_train.min()) >= 0 and float(data.x_train.max()) <= 1
    assert torch.equal(data.x_test, real.x_test) and torch.equal(data.x_validation, real.x_validation)
    assert MnistSimilar(n=95, seed=1).build().sha256() != data.sha256()


def test_gaussian_mixture_has_the_bayes_error_of_its_formula() -> None:
    """Two classes: the nearest centre is wrong with probability Phi(-distance / 2)."""
    from scipy.stats import norm

    data = GaussianMixture(classes=2, dimension=3, separation=1.2, n=40_000).build()
    means = gaussian_mixture.centres(2, 3, 1.2, 0)
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1.2)
    distances = ((data.x_train.numpy()[:, None] - means) ** 2).sum(-1)
    wrong = np.mean(distances.argmin(1) != data.y_train.numpy())
    expected = norm.cdf(-np.linalg.norm(means[0] - means[1]) / 2)
    assert abs(wrong - expected) < 5 * np.sqrt(expected * (1 - expected) / 40_000)


def test_the_teacher_leaves_only_the_noise() -> None:
    data = TeacherStudent(n=4000, noise=0.3).build()
    first, last = teacher_student.teacher(16, 8, 4, 0)
    rest = data.y_train.numpy() - np.tanh(data.x_train.numpy() @ first.T) @ last.T
    assert abs(rest.std() - 0.3) < 5 * 0.3 / np.sqrt(2 * rest.size)
    classified = TeacherStudent(task="classification", noise=0.0).build()
    answer = np.tanh(classified.x_train.numpy() @ first.T) @ last.T
    np.testing.assert_array_equal(classified.y_train.numpy(), answer.argmax(1))
    with pytest.raises(UserError, match=r"dataset.outputs = 1: expected at least 2"):
        TeacherStudent(task="classification", outputs=1).build()


def test_mnist1d_like_is_hard_for_a_linear_map_and_not_for_neighbours_of_clean_signals() -> None:
    from sklearn.linear_model import LogisticRegression

    data = Mnist1dLike(n=2000).build()
    x, y, x_test, y_test = (t.numpy() for t in (data.x_train, data.y_train, data.x_test, data.y_test))
    assert data.shape == (40,) and set(y.tolist()) == set(range(10))
    linear = LogisticRegression(max_iter=200, tol=1e-2).fit(x, y).score(x_test, y_test)
    assert 0.12 < linear < 0.6
    # invariant under shifts, as a convolution with pooling is: far better
    spectrum = [np.abs(np.fft.rfft(part, axis=1)) for part in (x, x_test)]
    distances = ((spectrum[1][:, None] - spectrum[0][None]) ** 2).sum(-1)
    assert np.mean(y[distances.argmin(1)] == y_test) > linear + 0.1
    curves = mnist1d_like.templates(0)
    np.testing.assert_allclose(np.abs(curves).max(1), 1.0)
    np.testing.assert_allclose(mnist1d_like.smooth(np.ones((1, 9)), 2.0), 1.0)
