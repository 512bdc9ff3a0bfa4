"""Hyperparameters in messages, in the form of the command line."""

from __future__ import annotations

import pytest

from cli.edit_output import parse_hparam
from cli.hparam_flags import in_flags
from cli.main import main
from service.errors import InvalidInput
from service.recipes.recipe import resolve_hparams
from tests.support.fake_http_service import FakeService


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ('name "hparams": {"layers": [5]} now', "name --hparam 'layers=[5]' now"),
        ('"hparams": {"form": "gated", "steps": 3}', "--hparam 'form=gated' --hparam 'steps=3'"),
        ("hparams.layers must name layers", "--hparam layers must name layers"),
        ('"hparams": {broken}', '"hparams": {broken}'),
        ("nothing of it", "nothing of it"),
    ],
)
def test_fields_become_flags(said: str, shown: str) -> None:
    """The fields of a request become the flags that set them, and other text is unchanged."""
    assert in_flags(said) == shown


def test_a_model_without_a_recipe_is_told_the_flag(
    fake: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error of the service for a model without a recipe names a flag that the command takes."""
    with pytest.raises(InvalidInput) as refused:
        resolve_hparams(None, None, 12)
    fake.responses = {"POST /edits": fake.problem(422, refused.value.detail)}
    assert main(["edit", "Nile", "{} is", "short"]) == 1
    said = capsys.readouterr().err
    assert "--hparam 'layers=[5]'" in said and "hparams" not in said
    assert parse_hparam("layers=[5]") == ("layers", [5])
