"""Files of the starter as studies: counts, expressions without eval, names, mistakes, stable order."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from descentlab.cli.main import app
from descentlab.config.expression import Unreadable, evaluate
from descentlab.config.identity import canonical
from descentlab.config.resolve import resolve, resolve_settings
from descentlab.config.starter import study_of
from descentlab.config.starter_grid import expand, sub_grids
from descentlab.config.starter_names import DEFAULTS, model
from descentlab.config.yaml12 import dump, load
from descentlab.core.errors import UserError

ROOT = Path(__file__).parent.parent
LINEAR = """
job_details: {name: linear, output_dir: results}
parameters:
  dataset: libsvm/covtype.binary
  model: linear
  train_length: 5
  batch_size: [8, 16, 32, 64, 128, 256]
  LIST_rates:
    - {base_lr: '[2.0**k for k in range(-6, 3)]', momentum: 0}
    - {base_lr: '[2.0**k / 10 for k in range(-6, 3)]', momentum: 0.9}
"""
MODELS = """
job_details: {name: models, output_dir: results}
parameters:
  dataset: timm/torch/cifar10
  optim_alg: adam
  base_lr: 1.0e-3
  LIST_OF_MODELS:
    - {model: [tiny/lenet, tiny/resnet_18], model_pretrained: false}
    - {model: timm/mobilenetv3_small_050, model_pretrained: [false, true]}
"""
NESTED = """
a: [1, 2]
b: '[x**2 for x in range(3)]'
c: 7
LIST_A:
  - {alg: sgd, momentum: [0, 0.9]}
  - {alg: adam, momentum: ['0.9,0.99']}
LIST_B:
  - r: 0
    LIST:
      - {p: 1, q: 2}
      - {p: 3, q: [4, 5]}
"""


def test_counts() -> None:
    """The three published examples: 108, 4 and 54; breaks when a LIST multiplies instead of adding, or drops keys."""
    for text, count in ((LINEAR, 108), (MODELS, 4)):
        settings, _ = study_of(load(text))
        assert len(resolve_settings(settings).runs) == count
    points, twice = expand(load(NESTED))
    assert (len(points), twice) == (54, [])
    assert [p["p"] for p in points[:3]] == [1, 3, 3] and {p["b"] for p in points} == {0, 1, 4}


def test_a_grid_has_the_settings_of_the_file() -> None:
    """Every (batch size, rate, momentum) of the file is one run, and none else; Nesterov follows the momentum."""
    cells = resolve_settings(study_of(load(LINEAR))[0]).cells
    found = sorted((c.batch_size, c.optimizer.lr, c.optimizer.momentum, c.optimizer.nesterov) for c in cells)
    rates = [2.0**k for k in range(-6, 3)]
    wanted = [(b, r, 0.0, False) for b in (8, 16, 32, 64, 128, 256) for r in rates]
    assert found == sorted(wanted + [(b, r / 10, 0.9, True) for b, *_ in wanted[::9] for r in rates])


def test_the_printed_study_gives_the_same_runs(tmp_path: Path) -> None:
    """Its text goes through YAML and the grammar of grids unchanged."""
    settings, _ = study_of(load(MODELS))
    path = tmp_path / "study.yaml"
    path.write_text(dump(settings))
    assert [r.id for r in resolve(path).runs] == [r.id for r in resolve_settings(settings).runs]


def test_sub_grids_are_exactly_the_points() -> None:
    """Random sets of points against brute force: the products of the blocks hold every point once."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        space = [dict(zip("abc", p, strict=True)) for p in itertools.product(range(3), range(2), range(3))]
        chosen = [space[i] for i in rng.permutation(len(space))[: rng.integers(1, 19)]]
        chosen = [{k: v for k, v in p.items() if k != "c" or v != 2} for p in chosen]  # some lack a key
        chosen = list({canonical(p): p for p in chosen}.values())
        blocks = sub_grids(chosen)
        points = [dict(zip(b, p, strict=True)) for b in blocks for p in itertools.product(*b.values())]
        assert sorted(map(canonical, points)) == sorted(map(canonical, chosen))


EXPRESSIONS = [
    ("2.0**-6", 2.0**-6),
    ("[10**-k for k in range(1, 4)]", [0.1, 0.01, 0.001]),
    ("[a*b for a in (1, 2) for b in [3, 4] if a != b]", [3, 4, 6, 8]),
    ("np.logspace(-2, 0, 3)", np.logspace(-2, 0, 3).tolist()),
    ("numpy.linspace(0, 1, num=5)", [0, 0.25, 0.5, 0.75, 1]),
    ("np.arange(0, 1, 0.25)", [0, 0.25, 0.5, 0.75]),
    ("list(range(3)) + [7 // 2, -5 % 3, round(2.6)]", [0, 1, 2, 3, 1, 3]),
    ("{'train': 'train[:90%]', 'test': 'test'}", {"train": "train[:90%]", "test": "test"}),
]


@pytest.mark.parametrize(("text", "value"), EXPRESSIONS)
def test_expressions(text: str, value: object) -> None:
    assert evaluate(text) == value


REFUSED = [
    "__import__('os').system('true')",
    "().__class__.__bases__[0]",
    "open('/etc/hostname').read()",
    "[x for x in ().__class__.__mro__]",
    "(lambda: 1)()",
    "np.random.uniform(0, 1)",
    "np.load('x')",
    "f'{1}'",
    "9**9**9**9",
    "10**5000",
    "range(10**9)",
    "[0 for a in range(9999) for b in range(9999)]",
    "np.linspace(0, 1, 10**9)",
    "'a' * 10**9",
    "[0] * 10**9",
    "(" * 500 + ")" * 500,
    "1 +",
    "1 / 0",
]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_plain_expression_is_refused(text: str) -> None:
    """Nothing is run, and nothing large is made first; breaks when the reader falls back on eval."""
    with pytest.raises(Unreadable):
        evaluate(text)


def test_a_bare_word_and_lists_are_values() -> None:
    """``model: linear`` raised a NameError in the starter, a list as a value was unhashable."""
    points, _ = expand({"model": "linear", "other": "tiny/lenet", "momentum": [[0.9, 0.99], [0.9, 0.999]]})
    assert [p["momentum"] for p in points] == [[0.9, 0.99], [0.9, 0.999]]
    assert {(p["model"], p["other"]) for p in points} == {("linear", "tiny/lenet")}


def test_duplicates_are_run_once_and_reported() -> None:
    settings, notes = study_of(load("parameters: {base_lr: [0.1, 0.2, 0.1], LIST: [{momentum: 0}, {momentum: [0]}]}"))
    assert len(resolve_settings(settings).runs) == 2
    assert "given more than once and run once: momentum=0" in notes
    assert sum("given more than once" in note for note in notes) == 2


def test_order_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    """The starter numbered runs in another order every time."""
    path = tmp_path / "job.yaml"
    path.write_text(MODELS.replace("base_lr", "momentum: [0.5, 0.9]\n  base_lr"))
    found = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "descentlab.cli", "import-spec", str(path)]
        found.append(subprocess.run(command, env=env, capture_output=True, check=True, text=True).stdout)
    assert found[0] == found[1] and "model.pretrained: [false, true]" in found[0]


SINGLE = {
    "dataset": "timm/torch/cifar10",
    "model": "tiny/lenet",
    "base_lr": "2.0**-4",
    "momentum": "0.9,0.99",
    "optim_alg": "amsgradw",
    "lr_schedule": "step_2,1,1_0.1",
    "warmup_steps": 5,
    "train_length": 7,
    "train_length_unit": "step",
    "steps_per_epoch": 3,
    "grad_accum_steps": 4,
    "batch_size": 64,
    "weight_decay": 1e-3,
    "averaging": "ema_0.999",
    "early_stopping_patience": 2,
    "best_checkpoint_metric": "test/av/loss",
    "data_splits_map": "{'train': 'train[:90%]', 'test': 'train[90%:]'}",
    "model_head_init": "zero",
    "seed_model": 1,
    "seed_training": 2,
    "output_dir": "x",
}


def test_one_configuration_with_every_kind_of_setting() -> None:
    settings, notes = study_of(SINGLE)
    (cell,) = resolve_settings(settings).cells
    assert (cell.optimizer.name, cell.optimizer.amsgrad, cell.optimizer.betas) == ("adamw", True, (0.9, 0.99))
    assert (cell.optimizer.lr, cell.optimizer.weight_decay, cell.bias_decay) == (0.0625, 1e-3, 0)
    assert (cell.schedule.parts, cell.schedule.factor, cell.schedule.steps) == ((2, 1, 1), 0.1, None)
    assert (cell.steps, cell.steps_per_epoch, cell.evaluate_epochs, cell.accumulation) == (7, 3, 1, 4)
    assert (cell.averaging.name, cell.averaging.decay, cell.patience) == ("ema", 0.999, 2)
    assert (cell.watch, cell.better(), cell.head_init) == ("test_loss_average", "min", "zero")
    assert (cell.seed_model, cell.seed, cell.max_loss) == (1, 2, 1e6)
    assert (cell.splits.train, cell.splits.test) == ("train[:90%]", "train[90%:]")
    assert any("output_dir" in note for note in notes) and any("micro-batches" in note for note in notes)


def test_the_defaults_are_those_of_the_starter() -> None:
    """An empty job trains what the starter's defaults train; a default is written out, so ours may differ."""
    settings, _ = study_of({"parameters": {"output_dir": "x"}})
    (cell,) = resolve_settings(settings).cells
    assert (cell.dataset.name, cell.model.name, cell.model.bias, cell.batch_size) == ("a9a", "linear", False, 100)
    assert (cell.optimizer.lr, cell.optimizer.momentum, cell.optimizer.nesterov) == (1.0, 0.9, True)
    assert (cell.epochs, cell.schedule.name, cell.averaging.name, cell.accumulation) == (100, "constant", "none", 1)


MISTAKES = [
    ({"bach_size": 3}, "bach_size = 3: expected a setting of the starter. did you mean 'batch_size'?"),
    ({"optim_alg": "lion"}, "optim_alg = 'lion': expected one of sgd, adam"),
    ({"model": "clip/vit_b32"}, "model = 'clip/vit_b32': expected one of linear"),
    ({"dataset": "timm/tfds/imagenet2012"}, "dataset = 'timm/tfds/imagenet2012': expected libsvm/NAME"),
    ({"lr_schedule": "step_a_b"}, "lr_schedule = 'step_a_b': expected"),
    ({"averaging": "mean"}, "averaging = 'mean': expected null, poly_ETA or ema_DECAY"),
    ({"base_lr": "np.random.uniform(0,1)"}, "a random value is {random"),
    ({"train_length_unit": "hour"}, "train_length_unit = 'hour': expected epoch, step or sample"),
    ({"data_splits_map": {"train": "trian"}}, "expected a part such as train"),
    ({"batch_size": 10, "grad_accum_steps": 3}, "accumulation = 3: expected a divisor of batch_size = 10"),
    ({"best_checkpoint_metric": "imagenet", "save_best_checkpoint": True}, "expected a pattern that fits one of"),
    ({"steps_per_epoch": 3, "samples_per_epoch": 300}, "only one of it and steps_per_epoch"),
]


@pytest.mark.parametrize(("settings", "words"), MISTAKES)
def test_a_mistake_is_one_line(settings: dict, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(settings))
    result = CliRunner().invoke(app, ["import-spec", str(path)])
    assert result.exit_code == 2 and words in result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ""


def test_all_mistakes_of_a_file_are_said_at_once() -> None:
    with pytest.raises(UserError) as caught:
        study_of({"batch_sise": 1, "loss": "hinge", "parameterz": 1, "averaging": "mean"})
    assert len(str(caught.value).splitlines()) == 4


def test_an_impossible_grid_is_refused() -> None:
    for parameters, words in (
        ({"a": list(range(200)), "b": list(range(200))}, "at most 10000 configurations"),
        ({"a": [1], "LIST": [{"a": 2}]}, "one place for each key"),
        ({"a": []}, "at least one value"),
        ({"LIST": {"a": 2}}, "a list of blocks"),
    ):
        with pytest.raises(UserError, match=words):
            expand(parameters)


def test_every_setting_of_the_starter_is_in_the_table() -> None:
    """docs/howto-starter.md has a row for each."""
    page = (ROOT / "docs" / "howto-starter.md").read_text()
    assert [key for key in DEFAULTS if f"`{key}`" not in page] == []


def test_out_writes_a_file_and_never_over_one(tmp_path: Path) -> None:
    job, out = tmp_path / "job.yaml", tmp_path / "study.yaml"
    job.write_text(LINEAR)
    run = CliRunner()
    assert run.invoke(app, ["import-spec", str(job), "--out", str(out)]).exit_code == 0
    assert len(resolve(out).runs) == 108
    assert run.invoke(app, ["import-spec", str(job), "--out", str(out)]).exit_code == 2


@pytest.mark.parametrize(
    ("name", "count"), [("linear_grid", 108), ("model_grid", 4), ("covtype_linear", 1), ("cifar_lenet", 3)]
)
def test_shipped_studies(name: str, count: int) -> None:
    """``show --runs`` prints one line per run, its id first; nothing is downloaded."""
    path = ROOT / "examples" / "studies" / f"{name}.yaml"
    lines = CliRunner().invoke(app, ["show", str(path), "--runs"]).stdout.splitlines()
    ids = [line.split()[0] for line in lines]
    assert len(set(ids)) == count == len(lines) and all(len(i) == 12 for i in ids)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tiny/vgg_16", {"model": "vgg16"}),
        ("tiny/wrn_10_2", {"model": "wrn", "model.depth": 10, "model.widen": 2}),
        ("tiny/wrn_28_10_0.3", {"model": "wrn", "model.depth": 28, "model.widen": 10, "model.dropout": 0.3}),
    ],
)
def test_models_for_small_images(name: str, settings: dict) -> None:
    assert model(name, False) == settings
    with pytest.raises(UserError, match="no trained weights"):
        model(name, True)


def test_datasets_that_timm_opens() -> None:
    study, _ = study_of({"dataset": "timm/torch/kmnist", "data_dir": "d", "model": "tiny/resnet_101"})
    assert study["dataset"] == {"name": "timm", "dataset": "torch/kmnist", "root": "d"}
    assert study["model"] == "resnet101"
