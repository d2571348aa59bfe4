"""Models: exact parameter counts, what does not fit, and three steps of each by every route that makes sense."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from descentlab.core.errors import UserError
from descentlab.core.specs import Option
from descentlab.core.streams import Streams
from descentlab.engine.lockstep import Lockstep
from descentlab.engine.program import BlockPlan, Route, RunPlan
from descentlab.launch import build
from descentlab.optim.specs import Sgd
from descentlab.studies.recovery.spec import RecoverySpec
from descentlab.workloads.base import Data, Workload
from descentlab.workloads.models.nanogpt import NanoGPT
from descentlab.workloads.specs import (
    MODELS,
    Cnn1,
    Cnn2,
    Digits,
    FlexibleCnn,
    GaussianMixture,
    Lenet5,
    Linear,
    Mlp,
    Mnist1dLike,
    NanoGpt,
    Quadratic,
    QuadraticModel,
    ResNet18,
    ResNet34,
    ResNet50,
    ResNet101,
    ResNet152,
    SmallCnn,
    TeacherStudent,
    Vgg11,
    Vgg13,
    Vgg16,
    Vgg19,
    WideResNet,
)

N = 24


def images(channels: int, size: int, classes: int = 10) -> Data:
    """Noise with random classes."""
    streams = Streams(1)
    x = streams.normal("x", N * channels * size * size, replicate=0).reshape(N, channels, size, size)
    return made(torch.from_numpy(x), torch.from_numpy(streams.integers("y", classes, N, replicate=0)), classes)


def text(vocabulary: int = 25, block: int = 16) -> Data:
    ids = torch.from_numpy(Streams(1).integers("ids", vocabulary, N + block, replicate=0))
    return made(ids[:-1].unfold(0, block, 1), ids[1:].unfold(0, block, 1), vocabulary)


def made(x: torch.Tensor, y: torch.Tensor, classes: int) -> Data:
    a, b = 2 * N // 3, 5 * N // 6
    return Data("made", x[:a], y[:a], x[a:b], y[a:b], x[b:], y[b:], classes, "generated", "none needed")


MNIST, CIFAR10, CIFAR100 = (1, 28, 10), (3, 32, 10), (3, 32, 100)

# published figures (LeCun 1998 with 400-120-84-10; He 2016 with a CIFAR stem; the sums are in the comments)
COUNTS: list[tuple[Option, Data, int]] = [
    (Linear(), images(*MNIST), 784 * 10 + 10),
    (Mlp(), images(*MNIST), 386),  # 36*8+8 + 8*10+10
    (Mlp(activation="relu"), images(*MNIST), 386),
    (
        Mlp(hidden=[16, 8], activations=["relu", "tanh"], batch_norm=True, pool=0),
        images(1, 8),
        1040 + 32 + 136 + 16 + 90,
    ),
    (SmallCnn(), images(*MNIST), 3778),
    (FlexibleCnn(), images(*MNIST), 395),  # 108 + 24 + 12*11+11 + 11*10+10
    (FlexibleCnn(activation="relu"), images(*MNIST), 395),
    (
        FlexibleCnn(
            channels=[4, 6], kernels=[5, 3], strides=[1, 2], pools=[2, 1], gap=False, head=[], batch_norm=False
        ),
        images(1, 16),
        (25 * 4 + 4) + (36 * 6 + 6) + (6 * 4 * 4 * 10 + 10),  # 16 -> 16 -> pool 8 -> stride 4
    ),
    (Lenet5(), images(*MNIST), 61_706),
    (Cnn1(), images(*MNIST), 1_199_882),
    (Cnn2(), images(*CIFAR10), 2_122_186),
    (Cnn2(), images(*CIFAR100), 2_168_356),
    (ResNet18(), images(*CIFAR10), 11_173_962),
    (ResNet18(), images(*CIFAR100), 11_220_132),
    (ResNet18(stem="7x7", bias=True), images(*CIFAR10), 11_186_442),
    (ResNet18(batch_norm=False), images(*CIFAR10), 11_173_962 - 4_800),  # 2 per channel of BatchNorm, 1 of a bias
    (ResNet34(), images(*CIFAR10), 21_282_122),
    (ResNet50(), images(*CIFAR10), 23_520_842),
    (ResNet101(), images(*CIFAR10), 42_512_970),
    (ResNet152(), images(*CIFAR10), 58_156_618),
    (Vgg11(), images(*CIFAR10), 9_231_114),  # of VGG for CIFAR-10 with BatchNorm and one linear layer, as published
    (Vgg13(), images(*CIFAR10), 9_416_010),
    (Vgg16(), images(*CIFAR10), 14_728_266),
    (Vgg16(batch_norm=False), images(*CIFAR10), 14_728_266 - 2 * 4224),
    (Vgg19(), images(*CIFAR10), 20_040_522),
    (WideResNet(), images(*CIFAR10), 2_748_890),  # WRN-16-4, "2.7M"; WRN-28-10, "36.5M"
    (WideResNet(depth=28, widen=10), images(*CIFAR10), 36_479_194),
    (NanoGpt(), text(), 960),
    (NanoGpt(), text(26), 976),
    (QuadraticModel(), Quadratic().build(), 24),
]


@pytest.mark.parametrize(("spec", "data", "count"), COUNTS, ids=lambda v: v.name if isinstance(v, Option) else "")
def test_parameter_count(spec: Option, data: Data, count: int) -> None:
    factory = spec.build()
    stemmed = data.map_inputs(factory.stem) if factory.stem else data
    with torch.device("meta"):  # shapes only
        module = factory.build(data)
        assert sum(p.numel() for p in module.parameters()) == count
        x = stemmed.x_train[:2].to("meta", torch.float32 if data.x_train.is_floating_point() else torch.int64)
        expected = (2, *data.y_train.shape[1:], *([data.classes] if data.classes else []))
        assert module(x).shape == expected


EXTRA = {"efficientnet_b0", "densenet121", "nf_resnet26", "timm", "clip"}  # counted in test_vision.py, where timm is


@pytest.mark.parametrize("name", sorted({*MODELS.names()} - EXTRA))
def test_the_count_that_list_shows_is_the_right_one(name: str) -> None:
    """Breaks when a default changes and its description does not."""
    cls = MODELS.options[name]
    stated = re.search(r"([\d,]+) parameters (?:on (\w+)|at its default size)\.", (cls.__doc__ or "").split("\n")[0])
    assert stated is not None
    count = int(stated[1].replace(",", ""))
    assert count in {expected for spec, _, expected in COUNTS if spec == cls()}


def test_batch_norm_buffers_of_resnet18() -> None:
    """9,600 running statistics and a counter for each of 20 layers (distributed training averages them too)."""
    with torch.device("meta"):
        module = ResNet18().build().build(images(*CIFAR10))
    assert sum(b.numel() for b in module.buffers()) == 9_620
    with torch.device("meta"):
        assert not list(ResNet18(batch_norm=False).build().build(images(*CIFAR10)).buffers())


def engine(
    spec: Option, data: Data, route: Route, monkeypatch: pytest.MonkeyPatch, members: int = 2, **settings: Any
) -> Lockstep:
    """Three steps on ``data``."""
    monkeypatch.setattr(build, "load_data", lambda _: data)
    base = {"dataset": Digits(), "dtype": "float64", "batch_size": 4, "optimizer": Sgd(lr=0.05, momentum=0.9)}
    cell = RecoverySpec(**{**base, "model": spec, **settings})
    runs = tuple(RunPlan(f"r{r}", r, 3, cell.optimizer.lr) for r in range(members))
    made_engine = Lockstep(BlockPlan("k", 0, route, runs), build.build_parts(cell, route))
    for _ in made_engine.run():
        pass
    return made_engine


SMALL: list[tuple[str, Option, Data]] = [
    ("linear", Linear(), images(1, 8)),
    ("linear regression", Linear(), TeacherStudent(n=16).build()),
    ("mlp", Mlp(hidden=[7, 5], activations=["relu", "gelu"], batch_norm=True, dropout=0.2, pool=4), images(1, 8)),
    ("mlp on vectors", Mlp(), GaussianMixture(n=16).build()),
    ("mlp on signals", Mlp(hidden=[6]), Mnist1dLike(n=16).build()),
    ("mlp regression", Mlp(activation="tanh"), TeacherStudent(n=16).build()),
    ("cnn", SmallCnn(channels=[3, 3, 4], pool=1), images(1, 8)),
    ("flexible_cnn", FlexibleCnn(), images(1, 8)),
    (
        "flexible_cnn with options",
        FlexibleCnn(
            channels=[3, 4], kernels=[5, 3], strides=[1, 2], pools=[2, 1], pooling="avg", downsample=2, gap=False,
            head=[6, 5], activations=["relu", "tanh", "gelu", "silu"], dropout=0.1,
        ),
        images(2, 16),
    ),
    ("lenet5", Lenet5(), images(1, 16)),
    ("nanogpt", NanoGpt(), text()),
    ("nanogpt with options", NanoGpt(width=6, heads=2, layers=2, hidden=0, dropout=0.1), text(5, 7)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spec", "data"), SMALL, ids=[name for name, _, _ in SMALL])
def test_three_steps_by_both_routes(name: str, spec: Option, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, BatchNorm buffers and losses agree; only rounding differs."""
    one, many = (engine(spec, data, route, monkeypatch) for route in ("member", "vmap"))
    for tree in ("params", "buffers"):
        held, again = getattr(one.state, tree), getattr(many.state, tree)
        assert held.keys() == again.keys()
        for key, value in held.items():
            torch.testing.assert_close(again[key], value, rtol=1e-9, atol=1e-11)
    rows = [e.recorder.flush()[0] for e in (one, many)]
    for column in ("train_loss", "train_accuracy", "test_loss"):
        seen = [np.array([v for v in r[column] if v is not None], dtype=float) for r in rows]
        np.testing.assert_allclose(seen[0], seen[1], rtol=1e-9, atol=1e-11)
    losses = np.array(rows[0]["train_loss"], dtype=float)
    assert len(losses) == 6 and np.isfinite(losses).all()
    start = build.build_parts(_cell(spec), "member").fresh(0)[0]
    assert all(not torch.equal(start[k], p[0]) for k, p in one.state.params.items() if p[0].any())


def _cell(spec: Option) -> RecoverySpec:
    return RecoverySpec(dataset=Digits(), dtype="float64", batch_size=4, model=spec)


LARGE: list[tuple[str, Option, Data]] = [
    ("cnn1", Cnn1(), images(1, 12)),
    ("cnn2", Cnn2(), images(3, 8)),
    ("resnet18", ResNet18(), images(3, 8)),
    ("resnet18 7x7", ResNet18(stem="7x7", bias=True, dropout=0.15), images(3, 8)),
    ("resnet18 without BatchNorm", ResNet18(batch_norm=False), images(3, 8)),
    ("resnet50", ResNet50(), images(3, 8)),
    ("vgg11", Vgg11(dropout=0.1), images(3, 8)),
    ("wrn 10 1", WideResNet(depth=10, widen=1, dropout=0.1), images(3, 8)),
]


@pytest.mark.parametrize(("name", "spec", "data"), LARGE, ids=[name for name, _, _ in LARGE])
def test_three_steps_of_large_models(name: str, spec: Option, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    done = engine(spec, data, "member", monkeypatch, 1, dtype="float32", optimizer=Sgd(lr=1e-3))
    columns = done.recorder.flush()[0]
    assert done.step == 3 and np.isfinite(np.array(columns["train_loss"], dtype=float)).all()
    assert not any(columns["nonfinite_params"])
    norms = [b for k, b in done.state.buffers.items() if k.endswith("running_mean")]
    assert bool(norms) == (getattr(spec, "batch_norm", False) or spec.name == "wrn")
    assert all(bool(b.any()) for b in norms)


def test_token_loss_is_the_mean_over_all_tokens() -> None:
    data = text(5, 7)
    work = Workload.of(data, NanoGpt().build(), dtype=torch.float64, device=torch.device("cpu"))
    logits = torch.from_numpy(Streams(0).normal("z", 4 * 7 * 5, replicate=0).reshape(4, 7, 5))
    y = data.y_train[:4]
    z = logits.numpy()
    by_hand = np.mean([math.log(np.exp(z[b, t]).sum()) - z[b, t, y[b, t]] for b in range(4) for t in range(7)])
    assert float(work.loss(logits, y)) == pytest.approx(by_hand, rel=1e-12)
    assert float(work.vectorised_loss(logits, y)) == pytest.approx(by_hand, rel=1e-12)
    assert float(work.accuracy(logits, y)) == np.mean(z.argmax(-1) == y.numpy())
    logits[0, 0] = math.nan  # a NaN output is never right
    z = logits.numpy()
    right = (z.argmax(-1) == y.numpy()) & np.isfinite(z).all(-1)
    assert float(work.accuracy(logits, y)) == right.mean()


@pytest.fixture
def gpt() -> NanoGPT:
    torch.manual_seed(0)
    model = NanoGPT(vocabulary=6, block=8, width=8, heads=2, layers=2, hidden=16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)  # away from the near-uniform predictions of a fresh model
    return model


def test_a_token_sees_no_later_token(gpt: NanoGPT) -> None:
    """Breaks when the causal mask is shifted or missing."""
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1]])
    changed = ids.clone()
    changed[0, 5:] = 3
    a, b = gpt(ids), gpt(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])
    torch.testing.assert_close(gpt(ids[:, :3]), a[:, :3])  # a context shorter than the block


def test_attention_is_torch_s(gpt: NanoGPT) -> None:
    x = torch.randn(3, 5, 8)
    layer = gpt.blocks[0].attention  # type: ignore[union-attr]
    split = layer.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(*split, is_causal=True).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(layer(x), layer.out(expected))


def test_generation(gpt: NanoGPT) -> None:
    start = torch.tensor([[2], [3]])
    cold = gpt.generate(start, 12, temperature=0)  # grows past the block
    ids = start
    for _ in range(12):
        ids = torch.cat([ids, gpt(ids[:, -8:])[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(cold, ids) and cold.shape == (2, 13)
    assert torch.equal(gpt.generate(start, 12, seed=4), gpt.generate(start, 12, seed=4))
    assert not torch.equal(gpt.generate(start, 12, seed=4), gpt.generate(start, 12, seed=5))
    many = gpt.generate(start[:1].repeat(4000, 1), 1, temperature=2.0)[:, 1]
    expected = (gpt(start[:1])[0, -1] / 2.0).softmax(-1)
    share = torch.bincount(many, minlength=6) / 4000
    assert float((share - expected.detach()).abs().max()) < 5 * math.sqrt(0.25 / 4000)
    assert gpt.training
    with pytest.raises(ValueError, match="temperature"):
        gpt.generate(start, 1, temperature=-1.0)
    with pytest.raises(ValueError, match="at most 8"):
        gpt(torch.zeros(1, 9, dtype=torch.int64))


MISFITS: Sequence[tuple[Option, Data, str]] = [
    (FlexibleCnn(), GaussianMixture().build(), "flexible_cnn classifies images"),
    (SmallCnn(), text(), "cnn classifies images"),
    (ResNet18(), Quadratic().build(), "resnet18 classifies images"),
    (Lenet5(), images(1, 4), "lenet5 needs larger images"),
    (FlexibleCnn(pools=[9]), images(1, 8), "flexible_cnn needs larger images"),
    (FlexibleCnn(downsample=9), images(1, 8), "flexible_cnn needs larger images"),
    (Mlp(), text(), "mlp takes real numbers, these are token ids"),
    (Linear(), Quadratic().build(), "linear predicts one class or one target vector"),
    (NanoGpt(), images(1, 8), "nanogpt predicts the next token"),
    (QuadraticModel(), images(1, 8), "matrix belongs to 'quadratic'"),
]


@pytest.mark.parametrize(("spec", "data", "words"), MISFITS)
def test_a_model_that_does_not_fit_says_so_in_one_line(spec: Option, data: Data, words: str) -> None:
    with pytest.raises(UserError) as error:
        spec.build().build(data)
    line = str(error.value)
    assert line.startswith(f"model = '{spec.name}': expected a model that fits dataset '{data.name}'")
    assert words in line and "\n" not in line


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Mlp(hidden=[4, 4, 4], activations=["relu", "silu"]), "model.activations"),
        (FlexibleCnn(channels=[4, 4], kernels=[3, 3, 3]), "one for each of the 2 layers"),
        (NanoGpt(width=8, heads=3), "a divisor of model.width = 8"),
        (Cnn1(dropout=[0.1, 1.0]), "model.dropout = 1.0"),
        (MODELS.parse({"name": "torch.nn:Linear", "options": {"in_features": 3}}), "arguments of torch.nn:Linear"),
    ],
)
def test_options_that_do_not_match_say_so(spec: Option, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        spec.build()


def test_any_module_by_name() -> None:
    spec = MODELS.parse({"name": "torch.nn:Linear", "options": {"in_features": 16, "out_features": 4}})
    module = spec.build().build(GaussianMixture().build())
    assert isinstance(module, nn.Linear) and module.weight.shape == (4, 16)
