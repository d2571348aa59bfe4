"""YAML 1.2 scalars and the grammar of ``key=value``."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from descentlab.config import yaml12
from descentlab.config.overrides import parse_override, parse_overrides, split_top
from descentlab.core.errors import UserError, UserErrors

# YAML 1.2 -----------------------------------------------------------------------------------------------------------

SCALARS = {
    "1e-3": 1e-3,
    "1E3": 1000.0,
    "-.5": -0.5,
    "1.": 1.0,
    ".inf": float("inf"),
    "-.INF": float("-inf"),
    "no": "no",
    "on": "on",
    "Yes": "Yes",
    "true": True,
    "FALSE": False,
    "null": None,
    "~": None,
    "010": 10,
    "0o10": 8,
    "0x1F": 31,
    "1:30": "1:30",
    "1_000": "1_000",
    "2024-01-01": "2024-01-01",
    "=": "=",
    "0b11": "0b11",
    "+12": 12,
    "e3": "e3",
    ".": ".",
    "'1e-3'": "1e-3",
    "my.module:Class": "my.module:Class",
    "{name: my.module:Class, lr: 1e-3}": {"name": "my.module:Class", "lr": 1e-3},
    "[1, 1.5, no]": [1, 1.5, "no"],
}


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_are_those_of_yaml_1_2(text: str) -> None:
    value = yaml12.load(text)
    assert (type(value), value) == (type(SCALARS[text]), SCALARS[text])


def test_nan_is_a_number() -> None:
    assert yaml12.load(".nan") != yaml12.load(".nan")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1': expected valid YAML 1.2 (the key 'a' is given twice)"),
        ("{x: {a: 1, a: 1}}", "the key 'a' is given twice"),
        ("[1, 2", "expected valid YAML 1.2"),
        ("!!python/object:os.system {}", "expected valid YAML 1.2"),
        ("? [a, b]\n: 1", "a key must be one word"),
        ("a: 1\n---\nb: 2", "expected valid YAML 1.2"),
        ("\x00", "expected valid YAML 1.2"),
        ("&a [*a]", "expected valid YAML 1.2"),
        ("[" * 1500, "expected valid YAML 1.2"),
    ],
)
def test_bad_yaml_is_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        yaml12.load(text, "study.yaml")
    assert says in str(caught.value)
    assert str(caught.value).startswith("study.yaml = ")
    assert "\n" not in str(caught.value)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from([*SCALARS, "1.5", "012", "- a", "a: b", "#", "'", '"']),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
def test_dump_and_load_round_trip(value: Any) -> None:
    assert yaml12.load(yaml12.dump(value)) == value
    assert yaml12.load(yaml12.inline(value)) == value
    assert "\n" not in yaml12.inline(value)


@pytest.mark.parametrize("text", ["no", "1e-3", "1:30", "010", "2024-01-01", "~", "0o10", "<<", "="])
def test_written_text_reads_as_text_in_yaml_1_1_too(text: str) -> None:
    assert yaml.safe_load(yaml12.dump({"key": text})) == {"key": text}


# The grammar --------------------------------------------------------------------------------------------------------

GRAMMAR = [
    ("optimizer.lr=1e-3", ["optimizer", "lr"], (1e-3,)),
    ("optimizer=adam,sgd", ["optimizer"], ("adam", "sgd")),
    ("optimizer.lr=1e-3,1e-2", ["optimizer", "lr"], (1e-3, 1e-2)),
    ("model.hidden=[16,8]", ["model", "hidden"], ([16, 8],)),
    ("model.hidden=[16,8],[4]", ["model", "hidden"], ([16, 8], [4])),
    ("optimizer={name: adam, lr: 1e-3}", ["optimizer"], ({"name": "adam", "lr": 1e-3},)),
    ("optimizer=sgd,{name: adam, betas: [0.9, 0.99]}", ["optimizer"], ("sgd", {"name": "adam", "betas": [0.9, 0.99]})),
    ("optimizer=my.module:Class", ["optimizer"], ("my.module:Class",)),
    ("a='x,y',z", ["a"], ("x,y", "z")),
    ('a="x,\\",y",z', ["a"], ('x,",y', "z")),
    ("a='it''s, fine',z", ["a"], ("it's, fine", "z")),
    ("a=it's,z", ["a"], ("it's", "z")),
    ("a={b: 'x,y]'},2", ["a"], ({"b": "x,y]"}, 2)),
    ("fault.step=null", ["fault", "step"], (None,)),
    ("a=no", ["a"], ("no",)),
    ("a=x=y", ["a"], ("x=y",)),
    ("a= 1 , 2 ", ["a"], (1, 2)),
    ("a=''", ["a"], ("",)),
]


@pytest.mark.parametrize(("argument", "path", "values"), GRAMMAR)
def test_grammar(argument: str, path: list[str], values: tuple[Any, ...]) -> None:
    override = parse_override(argument)
    assert (list(override.path), override.values, override.widens) == (path, values, len(values) > 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["optimizer"], "argument = 'optimizer': expected key.path=value"),
        (["=3"], "argument = '=3': expected a key path"),
        (["optimizer..lr=3"], "expected a key path"),
        (["a b=3"], "expected a key path"),
        (["lr="], "lr = '': expected a value; write null for none"),
        (["lr=1,"], "lr = '1,': expected a value between commas"),
        (["lr=[1"], "lr = 'line 1, column 3': expected valid YAML 1.2"),
        (["a=1", "a=2"], "a = '1 and 2': expected one value per key; for a grid write a=1,2"),
        (["a={b: 1, b: 2}"], "the key 'b' is given twice"),
    ],
)
def test_grammar_mistakes(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_overrides(arguments)
    assert says in str(caught.value)


def test_all_grammar_mistakes_are_said_at_once() -> None:
    with pytest.raises(UserErrors) as caught:
        parse_overrides(["optimizer", "lr="])
    assert len(caught.value.errors) == 2


@given(st.lists(PLAIN, min_size=1, max_size=4))
def test_any_values_written_inline_are_read_back(values: list[Any]) -> None:
    override = parse_override("key=" + ",".join(yaml12.inline(value) for value in values))
    assert list(override.values) == values


@given(st.text(st.sampled_from("ab,'\"[]{} :\\=#"), max_size=25))
def test_cutting_at_commas_loses_nothing(text: str) -> None:
    assert ",".join(split_top(text)) == text


@given(st.text(max_size=25))
def test_any_argument_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        parse_override(text)
    except UserError as error:
        assert error.expected
