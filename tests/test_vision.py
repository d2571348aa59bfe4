"""Models of the ``vision`` extra: they run in an environment that has it (constraints-vision.txt), else are skipped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from test_models import CIFAR10, images

import descentlab as dl
from descentlab.core.errors import UserError
from descentlab.core.opmode import trace
from descentlab.core.specs import Option
from descentlab.workloads.models.vision_specs import DenseNet121, EfficientNetB0, NfResNet26, Timm

HERE = importlib.util.find_spec("timm") is not None
needs_timm = pytest.mark.skipif(not HERE, reason="the vision extra is not installed")
NAMED: list[tuple[Option, int]] = [
    (EfficientNetB0(), 4_020_358),
    (DenseNet121(), 6_964_106),
    (NfResNet26(), 13_966_666),
    (Timm(architecture="resnet18"), 11_181_642),
]


@needs_timm
@pytest.mark.parametrize(("spec", "count"), NAMED, ids=lambda v: getattr(v, "name", ""))
def test_parameters_and_operations(spec: Option, count: int) -> None:
    """The counts are those of the architectures' authors at 10 classes; every convolution is seen by the faults."""
    from torch import nn

    data = images(*CIFAR10)
    module = spec.build().build(data).to(data.x_train.dtype)
    assert sum(p.numel() for p in module.parameters()) == count
    convolutions = [name for name, child in module.named_modules() if isinstance(child, nn.Conv2d)]
    seen = {r.layer for r in trace(module, data.x_train[:2]) if r.kind == "conv"}
    assert seen == set(convolutions)


@pytest.mark.parametrize(("spec", "count"), NAMED[:3], ids=lambda v: getattr(v, "name", ""))
def test_the_count_that_list_shows(spec: Option, count: int) -> None:
    assert f"{count:,} parameters on cifar10" in (type(spec).__doc__ or "").split("\n")[0]


@needs_timm
@pytest.mark.parametrize("model", ["efficientnet_b0", "densenet121", "nf_resnet26"])
def test_a_fault_in_each(model: str, tmp_path: Path) -> None:
    """One planned fault, met by the optimizer, beside its twin; the weights differ only after the hit."""
    settings = ["size=quick", "cases=1", "recovery_steps=2", "optimizer=sgd", "batch_size=4", "fault.step=1"]
    results = dl.run(
        "recovery",
        f"model={model}",
        "model.resize=32",
        "dataset=digits",
        *settings,
        out=tmp_path / "out",
        launcher="local",
    )
    table = results.frame.sort("step")
    losses = {role: t["train_loss"].to_list() for (role,), t in table.group_by("role")}
    assert len(losses["fault"]) == len(losses["twin"]) == 4
    assert losses["fault"][0] == losses["twin"][0]


@pytest.mark.skipif(HERE, reason="the vision extra is installed")
def test_without_the_extra() -> None:
    with pytest.raises(UserError, match=r"model = 'efficientnet_b0'.*descentlab\[vision\]"):
        EfficientNetB0().build()


@needs_timm
def test_a_name_timm_does_not_have() -> None:
    with pytest.raises(UserError, match=r"model.architecture = 'resnet19'.*resnet18"):
        Timm(architecture="resnet19").build()


@needs_timm
def test_pretrained_weights_come_from_a_file_but_for_the_head(tmp_path: Path) -> None:
    """Weights of another network of the same architecture, saved here: all but the head are theirs."""
    import timm
    import torch

    torch.manual_seed(1)
    donor = timm.create_model("resnet18", num_classes=1000)
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    data = images(*CIFAR10)
    spec = Timm(architecture="resnet18", pretrained=True, weights=str(tmp_path / "weights.pth"))
    made, theirs = spec.build().build(data).state_dict(), donor.state_dict()
    assert {n for n, t in made.items() if t.shape != theirs[n].shape} == {"fc.weight", "fc.bias"}
    assert all(torch.equal(t, theirs[n]) for n, t in made.items() if not n.startswith("fc."))


def test_a_file_of_weights_is_asked_for_with_the_flag_and_exists() -> None:
    with pytest.raises(ValueError, match=r"weights = w\.pth: expected pretrained = true beside it"):
        Timm(weights="w.pth")
    if HERE:
        with pytest.raises(UserError, match=r"model.weights = 'w.pth': expected an existing file"):
            Timm(pretrained=True, weights="w.pth").build()
