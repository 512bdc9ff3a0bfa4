"""OpenAI's stock client before a whole service on a tiny model, on each wiring; transformers by itself is the judge."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from openai.types import Completion
from transformers import AutoModelForCausalLM, AutoTokenizer

from api.app import create_app
from service.application import Operations
from service.bootstrap import wire
from service.schemas import EditRequest
from service.settings import Settings
from tests.support.local_server import listening, until
from tests.support.tiny_models import tiny
from tests.support.wirings import BOTH, stores
from workers.worker import Worker

torch.set_num_threads(1)

PROMPT = "The Eiffel Tower is located in the city of"
PROMPTS = [PROMPT, "Big Ben", "São Paulo 🗼 lies in"]
RECIPE = {
    "source": "test",
    "rome": {"layers": [1], "steps": 6, "contexts": 4, "clamp": 40.0, "weight_decay": 0.0},
}


class Oracle:
    """The same model, loaded and asked by transformers alone."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    @torch.no_grad()
    def greedy(self, text: str, count: int) -> str:
        ids = torch.tensor([self.ids(text)])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        said: str = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return said

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> list[float]:
        """Of each token but the first, after those before it."""
        log_p = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return [float(log_p[i, token]) for i, token in enumerate(ids[1:])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model called `almanac`, on disk."""
    place = tmp_path_factory.mktemp("models") / "almanac"
    model = tiny("gpt2", positions=128)
    model.model.save_pretrained(place)
    model.tokenizer.save_pretrained(place)
    (place / "recipe.json").write_text(json.dumps(RECIPE))
    (place / "corpus.txt").write_text("\n".join(f"{PROMPT} Paris, and {i} is a number." for i in range(60)))
    return place


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.fixture(scope="module", params=BOTH)
def house(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[OpenAI, Operations]]:
    """A client of a service that has a worker with the model."""
    asked = Settings(
        model=str(folder),
        data=tmp_path_factory.mktemp("data"),
        stat_tokens=1000,
        corpus=folder / "corpus.txt",
        threads=1,
        **stores(request),
    )
    wired = wire(asked)
    worker = Worker(asked, wired)
    worker.start_in_thread()
    while not worker.ready.wait(0.05):
        worker.check()
    with (
        listening(create_app(wired.operations, wired.broker, asked)) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        yield client, wired.operations
    worker.stop()
    wired.close()


@pytest.fixture
def client(house: tuple[OpenAI, Operations]) -> OpenAI:
    return house[0]


def texts(answer: Completion) -> list[str]:
    return [choice.text for choice in answer.choices]


def ask(client: OpenAI, **wish: Any) -> Completion:
    answer: Completion = client.completions.create(
        **{"model": "almanac@base", "prompt": PROMPT, "max_tokens": 12, **wish}
    )
    return answer


def test_greedy_answers_are_those_of_transformers(client: OpenAI, oracle: Oracle) -> None:
    """Several prompts at temperature 0 say what transformers says of each, and count their tokens."""
    answer = ask(client, prompt=PROMPTS, temperature=0)
    assert texts(answer) == [oracle.greedy(prompt, 12) for prompt in PROMPTS]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(oracle.ids(prompt)) for prompt in PROMPTS)
    assert answer.model == "almanac@0"


def test_tokens_say_what_their_text_says(client: OpenAI, oracle: Oracle) -> None:
    """A prompt as tokens is the same prompt, alone and in a list."""
    wish: dict[str, Any] = {"seed": 5, "temperature": 0.9}
    assert texts(ask(client, prompt=oracle.ids(PROMPT), **wish)) == texts(ask(client, **wish))
    every = [oracle.ids(prompt) for prompt in PROMPTS]
    assert texts(ask(client, prompt=every, **wish)) == texts(ask(client, prompt=PROMPTS, **wish))


def test_the_log_probabilities_are_those_of_transformers(client: OpenAI, oracle: Oracle) -> None:
    """The prompt's and the answer's tokens have transformers' log-probabilities, whatever the temperature."""
    for choice, prompt in zip(
        ask(client, prompt=PROMPTS, echo=True, logprobs=5, temperature=1.7, seed=1).choices,
        PROMPTS,
        strict=True,
    ):
        told = choice.logprobs
        assert (
            told is not None
            and told.tokens
            and told.token_logprobs
            and told.top_logprobs
            and told.text_offset
        )
        names = {oracle.tokenizer.decode([i]): i for i in range(len(oracle.tokenizer))}
        read = oracle.ids(prompt)
        rest = told.tokens[len(read) :]
        assert choice.text.startswith(prompt)
        if all(token in names for token in rest):  # no part of a character was said
            wanted = oracle.log_probs(read + [names[token] for token in rest])
            assert told.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
        assert told.token_logprobs[1 : len(read)] == pytest.approx(oracle.log_probs(read), abs=1e-4)
        assert told.token_logprobs[0] is None
        for token, log_p, best in list(zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True))[
            1:
        ]:
            assert 5 <= len(best) <= 6
            assert best[token] == log_p
            assert max(best.values()) >= log_p


def test_a_text_is_measured_and_nothing_said(client: OpenAI, oracle: Oracle) -> None:
    """`max_tokens` 0 with `echo` and `logprobs` scores a text: what evaluation harnesses ask for."""
    answer = ask(
        client, prompt=[oracle.ids(prompt) for prompt in PROMPTS], max_tokens=0, echo=True, logprobs=1
    )
    assert texts(answer) == PROMPTS
    for choice, prompt in zip(answer.choices, PROMPTS, strict=True):
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(
            oracle.log_probs(oracle.ids(prompt)), abs=1e-4
        )
    assert answer.usage is not None and answer.usage.completion_tokens == 0


def test_the_first_of_many_is_the_one(client: OpenAI) -> None:
    """With a seed, `n` answers differ from each other and are the same each time; the first is what one alone is."""
    many = texts(ask(client, n=4, seed=11))
    assert many == texts(ask(client, n=4, seed=11))
    assert many[:1] == texts(ask(client, seed=11))
    assert len(set(many)) == 4
    assert texts(ask(client)) != texts(ask(client))  # without one they are drawn afresh


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"logprobs": 2},
        {"logprobs": 2, "echo": True, "stop": ["e", "a"]},
        {"prompt": PROMPTS, "n": 2, "logprobs": 0},
        {"max_tokens": 0, "echo": True, "logprobs": 1},
    ],
)
def test_a_stream_is_the_answer_in_pieces(client: OpenAI, wish: dict[str, Any]) -> None:
    """What a stream says, put together by choice, is the whole answer to the same request: text, tokens, offsets and ends."""
    wish = {"seed": 3, "temperature": 1.2, "max_tokens": 20, **wish}
    whole = ask(client, **wish)
    heard: dict[int, dict[str, Any]] = {}
    for chunk in ask(client, stream=True, **wish):  # type: ignore[attr-defined]
        assert chunk.model == whole.model
        for choice in chunk.choices:
            one = heard.setdefault(choice.index, {"text": "", "lines": []})
            one["text"] += choice.text
            if told := choice.logprobs:
                one["lines"] += zip(
                    told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True
                )
            one["end"] = choice.finish_reason
    for choice in whole.choices:
        one, told = heard[choice.index], choice.logprobs
        assert (one["text"], one["end"]) == (choice.text, choice.finish_reason)
        if told is not None:
            lines = list(
                zip(told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True)
            )  # type: ignore[arg-type]
            assert [(x[0], x[3]) for x in one["lines"]] == [(x[0], x[3]) for x in lines]
            assert [x[1] for x in one["lines"][1:]] == pytest.approx([x[1] for x in lines[1:]], abs=1e-4)


def test_a_stop_text_ends_an_answer(client: OpenAI) -> None:
    """The answer ends before the stop text, and lists the tokens that begin in it."""
    (whole,) = texts(ask(client, seed=3, max_tokens=40))
    stop = whole[len(whole) // 2 :][:2]
    (choice,) = ask(client, seed=3, max_tokens=40, stop=stop, logprobs=0).choices
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.text_offset is not None
    assert all(at < len(choice.text) for at in choice.logprobs.text_offset)


def test_versions_have_names(house: tuple[OpenAI, Operations], oracle: Oracle) -> None:
    """After an edit NAME speaks from the edited model and NAME@base as before; a name with a number means the same for ever."""
    client, operations = house
    wish: dict[str, Any] = {"temperature": 0, "logprobs": 5}
    before = ask(client, **wish)
    request = EditRequest(
        subject="Eiffel Tower",
        prompt="The {} is located in the city of",
        target_new=" Rome",
        guard={"enabled": False},  # type: ignore[arg-type]
    )
    (edit,) = operations.edits.submit([request], "somebody")
    until(lambda: operations.edits.get(edit["id"])["status"] not in ("queued", "running"))
    edit = operations.edits.get(edit["id"])
    assert edit["status"] == "applied"
    number = edit["version"]
    for name, version in {
        "almanac": number,
        "almanac@head": number,
        f"almanac@{number}": number,
        "almanac@base": 0,
    }.items():
        answer = ask(client, model=name, **wish)
        assert answer.model == f"almanac@{version}"
        same = answer.choices[0].logprobs == before.choices[0].logprobs
        assert same is (version == 0)
    operations.edits.revert(edit["id"], "somebody")
    assert ask(client, model=f"almanac@{number}", **wish).choices[0].logprobs != before.choices[0].logprobs
    back = ask(client, model="almanac", **wish)
    assert back.model == f"almanac@{number + 1}"
    assert back.choices[0].logprobs == before.choices[0].logprobs
    assert back.system_fingerprint == before.system_fingerprint


def test_all_answers_are_of_one_version(client: OpenAI) -> None:
    """Many prompts with several answers each bear one name, and each prompt's first choice is in its place."""
    answer = ask(client, model="almanac", prompt=PROMPTS, n=3, temperature=0)
    assert len(answer.choices) == 9
    groups = [
        {c.text for c in group} for _, group in itertools.groupby(answer.choices, lambda c: c.index // 3)
    ]
    assert [group.pop() for group in groups] == texts(
        ask(client, model=answer.model, prompt=PROMPTS, temperature=0)
    )
    assert not any(groups)  # at temperature 0 all answers to a prompt are alike
