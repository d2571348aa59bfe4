"""Published command lines: what they are turned into, that it runs and exports, and one error for each mistake."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from descentlab.cli.compat import native
from descentlab.cli.main import app
from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError

SMALL = ["size=quick", "dataset=digits", "model.pool=1", "batch_size=32"]


def test_the_published_defaults() -> None:
    """Four optimizers at 1e-3, ten experiments, 100 steps, seed 42; nothing else is decided here."""
    assert native([]).command == (
        "descentlab run recovery preset=published optimizer=adam,sgd,rmsprop,adamw optimizer.lr=0.001 seed=42 cases=10 "
        "recovery_steps=100 --out out/compat-v3 -y"
    )


def test_the_native_command_has_the_published_settings() -> None:
    """Resolved by the config, not read from the text: V3's constants of facts known from its source."""
    wanted = native(["--optimizers", "adam", "sgd", "--learning-rate", "3e-3", "--num-experiments", "2"])
    cells = resolve("recovery", wanted.settings).cells
    assert [cell.optimizer.name for cell in cells] == ["adam", "sgd"]
    for cell in cells:
        dumped = cell.model_dump()
        assert (dumped["seed"], dumped["cases"], dumped["recovery_steps"]) == (42, 2, 100)
        assert dumped["optimizer"]["lr"] == 3e-3
        assert (dumped["schedule"]["name"], dumped["schedule"]["end"], dumped["schedule"]["steps"]) == (
            "linear",
            1e-4,
            5000,
        )
        fault = dumped["fault"]
        assert (fault["name"], fault["value_low"], fault["value_high"], fault["last_epoch"]) == (
            "N16_RD",
            360,
            1.2e8,
            3,
        )
    assert cells[0].model_dump()["optimizer"]["eps"] == 1e-7 and cells[1].model_dump()["optimizer"]["momentum"] == 0.9


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ("--optimizers adam,sgd rmsprop", "optimizer=adam,sgd,rmsprop"),
        ("--steps-after-injection 7", "recovery_steps=7"),
        ("--seed=7", "seed=7"),
        ("--model mlp", "model=mlp"),
        ("--model resnet18_nobn", "model={name: resnet18, stem: 7x7, batch_norm: false, dropout: 0.15}"),
        ("--dataset cifar10", "dataset=cifar10"),
        ("--batch-size 1024", "batch_size=1024"),
        ("--fault RD", "fault=RD"),
        ("--fault RD", "fault.value_mode=log_uniform"),
        ("--stage bkwd_inject", "fault.direction=grad_input"),
        ("--layer conv1", "fault.layer=conv1"),
        ("--value-range 1e3 1e5", "fault.value_high=100000.0"),
        ("--max-target-epoch 1", "fault.last_epoch=1"),
        ("--eval-interval 5", "observe.evaluate_every=5"),
        ("--device cpu", "device=cpu"),
        ("--processes 1", "processes=1"),
        ("--set model.pool=1 observe.every=2", "observe.every=2"),
    ],
)
def test_flags_and_settings(given: str, setting: str) -> None:
    assert setting in native(given.split()).settings


def test_the_networks_of_the_published_program() -> None:
    """11,186,442 parameters, as published (the 7 x 7 stem and convolutions with biases make the difference)."""
    torch = pytest.importorskip("torch")
    from descentlab.workloads.base import Data

    halves = (torch.zeros(2, 3, 32, 32), torch.zeros(2).long())
    data = Data("cifar10", *halves, *halves, *halves, classes=10, source="", licence="")
    for name in ("resnet18", "resnet18_sgd"):
        settings = native(["--model", name, "--optimizers", "adam"]).settings
        model = resolve("recovery", settings).cells[0].model.build().build(data)
        assert sum(p.numel() for p in model.parameters()) == 11_186_442


def test_published_names_of_networks_from_the_vision_extra() -> None:
    for published, own in {"effnet": "efficientnet_b0", "densenet": "densenet121", "nfnet": "nf_resnet26"}.items():
        settings = native(["--model", published, "--dataset", "cifar10", "--optimizers", "adam"]).settings
        assert resolve("recovery", settings).cells[0].model.name == own


def test_the_version_before_is_accepted() -> None:
    """Resolved: the baseline trains with the published settings and the rate that was given, the others continue."""
    wanted = native(["--baseline", "adam", "--test-optimizers", "sgd", "rmsprop", "--learning-rate", "3e-3"])
    assert {"protocol=baseline", "baseline=adam", "optimizer=sgd,rmsprop"} <= set(wanted.settings)
    cells = [cell.model_dump() for cell in resolve("recovery", wanted.settings).cells]
    assert [cell["optimizer"]["name"] for cell in cells] == ["sgd", "rmsprop"]
    for cell in cells:
        assert (cell["protocol"], cell["carry_state"]) == ("baseline", True)
        assert (cell["baseline"]["lr"], cell["baseline"]["eps"], cell["optimizer"]["lr"]) == (3e-3, 1e-7, 3e-3)
    assert any("--set carry_state=false" in note for note in wanted.notes)


def test_the_version_before_runs_and_exports(tmp_path: Path) -> None:
    """Both optimizers continue one prefix: before the fault their published histories are the same, after it not."""
    given = "--baseline adam --test-optimizers sgd rmsprop --num-experiments 1 --steps-after-injection 5"
    more = "--max-target-epoch 0 --launcher local"
    code, said = invoke("v3", *given.split(), *more.split(), "--out", str(tmp_path / "run"), "--set", *SMALL)
    assert code == 0, said
    files = tmp_path / "run" / "export" / "v3" / "experiment_000"
    sgd, rmsprop = ((files / f"history_{name}.csv").read_text().splitlines() for name in ("sgd", "rmsprop"))
    assert len(sgd) == len(rmsprop) > 7 and sgd[:-5] == rmsprop[:-5] and sgd[-1] != rmsprop[-1]
    assert "Protocol baseline: adam trained up to" in (tmp_path / "run" / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("--base-seed 3", r"--base-seed = '3': expected --seed, the flag that the published program has"),
        ("--num-experiments ten", r"--num-experiments = 'ten': expected a whole number"),
        ("--learning-rate fast", r"--learning-rate = 'fast': expected a number"),
        ("--optimizers", r"--optimizers = '': expected at least one argument"),
        ("--learning-rat 1", r"compat v3 = '--learning-rat': expected a flag .* did you mean '--learning-rate'\?"),
        ("--test-optimizers sgd", r"--test-optimizers = \['sgd'\]: expected a --baseline"),
        ("--optimizers adam --baseline sgd --test-optimizers sgd", r"either --optimizers or --test-optimizers"),
        ("--launcher moon", r"--launcher = '': expected .*moon.*local"),
    ],
)
def test_a_mistake_is_one_line(given: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        native(given.split())
    assert "\n" not in str(caught.value)


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["compat", *arguments])
    return result.exit_code, result.output


def test_an_unknown_optimizer_is_an_error_not_adam() -> None:
    code, said = invoke("v3", "--optimizers", "adamm")
    assert code == 2 and "did you mean 'adam'?" in said and "Traceback" not in said


def test_help_and_unknown_programs() -> None:
    for arguments in (["--help"], ["v3", "--help"], ["v3", "--seed", "1", "-h"]):
        code, said = invoke(*arguments)
        assert code == 0 and "--steps-after-injection" in said and "--baseline" in said
    code, said = invoke("v33")
    assert code == 2 and "compat = 'v33': expected one of v3, nn_train, sync, async. did you mean 'v3'?" in said


def test_a_dry_run_prints_the_command_and_touches_nothing(tmp_path: Path) -> None:
    code, said = invoke("v3", "-n", "--num-experiments", "1", "--out", str(tmp_path / "x"), "--set", *SMALL)
    assert code == 0 and said.startswith("descentlab run recovery preset=published") and not (tmp_path / "x").exists()


def test_it_runs_and_exports(tmp_path: Path) -> None:
    """The printed command resolves to the run ids that the directory holds: the same thing was run."""
    given = "--optimizers adam sgd --num-experiments 2 --steps-after-injection 5 --max-target-epoch 0 --launcher local"
    code, said = invoke("v3", *given.split(), "--out", str(tmp_path / "run"), "--set", *SMALL)
    assert code == 0, said
    command = shlex.split(said.splitlines()[0])
    settings = [word for word in command[3:] if re.match(r"[\w.]+=", word)]
    wanted = {run.id for run in resolve("recovery", settings).runs}
    held = [json.loads(line)["id"] for line in (tmp_path / "run" / "resolved.jsonl").read_text().splitlines()]
    assert set(held) == wanted and len(wanted) == 8
    summary = json.loads((tmp_path / "run" / "export" / "v3" / "intermediate_summary.json").read_text())
    assert summary["completed_experiments"] == 2 and summary["optimizers_tested"] == ["adam", "sgd"]
