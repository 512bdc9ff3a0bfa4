"""The bench of generation compares ways that answer the same questions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from bench.generation import Continuous, Heard, OneByOne, Ours, Race, endless, plain
from bench.house import House
from service.engine.decoding import end_tokens
from service.models.loading import LoadedModel
from service.schemas import Sampling
from tests.support.tiny_models import tiny

torch.set_num_threads(1)

PROMPTS = ["The Eiffel Tower is located in", "Big Ben", "In which country is Mount Fuji?"]
GREEDY = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny("gpt2")


@pytest.fixture(scope="module")
def house(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("house"), model) as house:
        yield house


def test_a_plain_model_has_the_same_weights_in_their_own_modules(model: LoadedModel) -> None:
    """What we are compared with is transformers' model as it comes, and says what ours says."""
    ids = torch.tensor([model.encode(PROMPTS[0])[0]])
    theirs = plain(model)
    assert theirs is not model.model and type(theirs) is type(model.model)
    torch.testing.assert_close(theirs(ids).logits, model.model(ids).logits)


def test_every_way_answers_every_prompt_alike(model: LoadedModel, house: House) -> None:
    """One by one, continuous and ours give the same greedy tokens, and as many answers as prompts."""
    ways = {"one by one": OneByOne(model), "continuous": Continuous(model), "ours": Ours(house, "base")}
    with endless(model):
        heard = {name: way(PROMPTS, GREEDY, 2) for name, way in ways.items()}
    assert heard["ours"].said == heard["continuous"].said == heard["one by one"].said
    assert all(len(h.firsts) == len(PROMPTS) and h.tokens == 18 and h.speed > 0 for h in heard.values())
    assert len(heard["ours"].pauses) <= 15


def test_no_token_ends_an_endless_text(model: LoadedModel) -> None:
    """Meanwhile the model knows no end of text, and afterwards it knows it again."""
    before = end_tokens(model)
    with endless(model):
        assert not end_tokens(model)
    assert end_tokens(model) == before


def test_a_queue_is_reckoned_from_what_was_measured(model: LoadedModel) -> None:
    """With callers that wait for each other, one by one's first tokens come later and later, and never out of turn."""
    way = OneByOne(model)
    alone, queued = way(PROMPTS, GREEDY, 1), way(PROMPTS, GREEDY, 3)
    assert sorted(queued.firsts) == queued.firsts
    assert sum(alone.firsts) < alone.seconds and queued.firsts[-1] < queued.seconds


def test_a_way_that_fails_is_told_and_left_out(model: LoadedModel, house: House) -> None:
    """The others go on; the table has one row for each way and number of callers, and parity counts the prompts."""

    def broken(*_: object) -> Heard:
        raise RuntimeError("not on this machine")

    ways = {"one by one": OneByOne(model), "continuous": broken, "ours": Ours(house, "base")}
    race = Race(ways, [1, 2], PROMPTS)
    race.run(GREEDY, 2, lambda way: nullcontext(), lambda: None)
    assert race.failed == {"continuous": "RuntimeError: not on this machine"}
    assert [tuple(row[:2]) for row in race.rows()] == [
        ("one by one", 1),
        ("ours", 1),
        ("one by one", 2),
        ("ours", 2),
    ]
    assert race.parity("ours").startswith("ours: 12 of 12 answers")
