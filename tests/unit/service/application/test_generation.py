"""What a worker is asked to say, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from service.application import Operations
from service.db.database import Database
from service.errors import InvalidInput, QueueFull
from service.jobs.broker import Broker
from service.jobs.job_store import Desk
from service.schemas import CompareRequest, GenerateRequest
from service.settings import Settings
from tests.support.served_model import INFO, tokenizer_json


class TestSpeech:
    def test_generate(self, operations: Operations, broker: Broker) -> None:
        """A generation goes to the workers as it was asked."""
        request = GenerateRequest(prompt="The Eiffel Tower", seed=7, stop=["."])
        channel = operations.calls.generate(request)
        (delivery,) = broker.take(["generate"], 1, 0)
        assert delivery.job_id == channel
        assert GenerateRequest.model_validate(delivery.payload) == request

    def test_compare(self, operations: Operations, broker: Broker, landed: Callable[..., Any]) -> None:
        """So does a comparison."""
        landed()
        request = CompareRequest(prompt="The Eiffel Tower", versions=(0, 1))
        operations.calls.compare(request)
        (delivery,) = broker.take(["compare"], 1, 0)
        assert CompareRequest.model_validate(delivery.payload) == request

    @pytest.mark.parametrize(
        ("field", "changes"),
        [
            ("version", {"version": 1}),
            ("version", {"version": -1}),
            ("min_version", {"min_version": 1}),
            ("prompt", {"prompts": ["both"]}),
            ("prompt", {"prompt": "word " * 100}),
        ],
    )
    def test_refused(self, operations: Operations, broker: Broker, field: str, changes: Any) -> None:
        """A generation that cannot be had is refused before a worker hears of it."""
        with pytest.raises(InvalidInput) as error:
            operations.calls.generate(GenerateRequest(**{"prompt": "The", **changes}))
        assert error.value.field == field
        assert broker.waiting("generate") == 0

    def test_older_than_wanted(self, operations: Operations, landed: Callable[..., Any]) -> None:
        """A pinned version must not be older than the one that the client has seen."""
        landed()
        assert operations.calls.generate(GenerateRequest(prompt="The", min_version=1))
        assert operations.calls.generate(GenerateRequest(prompt="The", version=1, min_version=1))
        with pytest.raises(InvalidInput, match="older"):
            operations.calls.generate(GenerateRequest(prompt="The", version="base", min_version=1))

    def test_unknown_side(self, operations: Operations) -> None:
        """Both versions of a comparison must exist."""
        with pytest.raises(InvalidInput, match="no version 3"):
            operations.calls.compare(CompareRequest(prompt="The", versions=("base", 3)))

    def test_ask_again(self, operations: Operations, broker: Broker) -> None:
        """A call that the queue lost is asked again as it was, on its channel."""
        request = GenerateRequest(prompt="The", seed=3)
        channel = operations.calls.generate(request)
        (first,) = broker.take(["generate"], 1, 0)
        broker.done(first)
        operations.calls.ask_again("generate", channel, request)
        (second,) = broker.take(["generate"], 1, 0)
        assert (second.job_id, second.payload) == (channel, first.payload)

    def test_most_tokens(self, database: Database, broker: Broker, desk: Desk, tmp_path: Path) -> None:
        """No more tokens can be asked for than the settings allow."""
        operations = Operations(database, broker, Settings(data=tmp_path, max_new_tokens=7))
        operations.calls.generate(GenerateRequest(prompt="The", max_new_tokens=7))
        for verb, request in (
            (operations.calls.generate, GenerateRequest(prompt="The", max_new_tokens=8)),
            (operations.calls.compare, CompareRequest(prompt="The", max_new_tokens=8)),
        ):
            with pytest.raises(InvalidInput, match="at most 7") as error:
                verb(request)
            assert error.value.field == "max_new_tokens"

    def test_the_tokenizer_is_read_once(self, operations: Operations, database: Database, desk: Desk) -> None:
        """Of the megabytes of a tokenizer nothing is read by a request, but by the first after a worker came up."""
        asked = []

        def note(*args: Any) -> None:
            asked.append("tokenizer" in args[2])

        event.listen(database.engine, "before_cursor_execute", note)
        for _ in range(3):
            operations.calls.generate(GenerateRequest(prompt="The"))
        assert sum(asked) == 1
        desk.register(INFO, tokenizer_json())
        asked.clear()
        for _ in range(2):
            operations.calls.generate(GenerateRequest(prompt="The"))
        assert sum(asked) == 1
        event.remove(database.engine, "before_cursor_execute", note)

    def test_queue_full(self, operations: Operations) -> None:
        """Too many waiting generations are refused with the time after which to try again."""
        for _ in range(5):
            operations.calls.generate(GenerateRequest(prompt="The"))
        with pytest.raises(QueueFull) as error:
            operations.calls.generate(GenerateRequest(prompt="The"))
        assert error.value.retry_after > 0
