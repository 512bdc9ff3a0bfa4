"""The registry of editing methods: service.methods.registry."""

from __future__ import annotations

from importlib import import_module
from typing import get_args

import pytest

from service.errors import InvalidInput
from service.methods.registry import DEFAULT_METHOD, METHODS, SOLVE_RULES, get_method
from service.schemas import MethodName


def test_the_schema_lists_the_registry() -> None:
    """The request schema accepts the names of the registry, in its order; the default method is the first."""
    assert get_args(MethodName) == tuple(METHODS)
    assert next(iter(METHODS)) == DEFAULT_METHOD


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_complete(name: str) -> None:
    """The implementation of each method exists, and its hyperparameters validate with layers alone."""
    method = METHODS[name]
    module, _, function = method.implementation.partition(":")
    assert callable(getattr(import_module(module), function))
    parameters = method.parameters.model_validate({"layers": [0], **method.fixed_hparams})
    assert parameters.layers == (0,)
    assert method.describe()["closed_form"] == method.searches_value
    assert method.writes_associations == (method.solve is not None)
    assert method.writes_associations or not (method.needs_covariance or method.searches_value)


@pytest.mark.parametrize("name", METHODS)
def test_the_search_space_is_valid(name: str) -> None:
    """Every value that the search for a recipe tries is a valid hyperparameter of the method."""
    for stage in METHODS[name].search_space:
        for values in stage:
            METHODS[name].parameters.model_validate({"layers": [0], **values})


def test_solve_rules_have_one_meaning() -> None:
    """Methods with the same rule name share the rule, because the name is stored with the factors of edits."""
    for method in METHODS.values():
        if method.solve is not None:
            assert SOLVE_RULES[method.solve.name] == method.solve


def test_unknown_method() -> None:
    """The error of an unknown method lists the known ones."""
    with pytest.raises(InvalidInput, match="rome, r-rome"):
        get_method("x")
