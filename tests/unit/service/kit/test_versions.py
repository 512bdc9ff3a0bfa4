"""Model ids of versions: service.kit.versions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import NotFound
from service.kit.versions import format_model_id, parse_model_id

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(NAMES, st.integers(0, 50), st.data())
def test_a_version_is_found_by_its_name(name: str, head: int, data: st.DataObject) -> None:
    """The model id of a version is parsed to that version, for any model name, also with `@` and `/`."""
    version = data.draw(st.integers(0, head))
    assert parse_model_id(format_model_id(name, version), name, head) == version
    assert parse_model_id(name, name, head) == parse_model_id(f"{name}@head", name, head) == head
    assert parse_model_id(f"{name}@base", name, head) == 0


@pytest.mark.parametrize("model_id", ["meta/almanac@2", "./models/almanac@2", "/srv/models/almanac@2"])
def test_model_id_may_have_a_path_prefix(model_id: str) -> None:
    """A model id may have a path or an organization before the model's name."""
    assert parse_model_id(model_id, "almanac", 3) == 2


@pytest.mark.parametrize(
    "model_id",
    ["", "@", "gpt-4", "almanac@", "almanac@4", "almanac@-0", "almanac@²", "almanac@9999999999", "almanac/"],
)
def test_unknown_model_ids_list_the_available_names(model_id: str) -> None:
    """The error of an unknown model id lists the available ids."""
    with pytest.raises(NotFound, match=r"almanac@base, or almanac@0 to almanac@3\.$") as refused:
        parse_model_id(model_id, "almanac", 3)
    assert refused.value.field == "model"
