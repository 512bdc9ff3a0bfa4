"""Request bodies that make a naive service do unbounded work, for tests and for `bench/abuse.py`."""

from __future__ import annotations

import json
from typing import Any

#: routes that read JSON, with a limit of 1 MB unless they read records
JSON_PATHS = (
    "/edits",
    "/edits/revert",
    "/edits/preview",
    "/versions/release-1",
    "/trace",
    "/evaluations",
    "/trainings",
    "/generate",
    "/compare",
    "/exports",
    "/v1/completions",
    "/v1/chat/completions",
)
PUT_PATHS = ("/versions/release-1",)  #: of these, the ones that are PUT and not POST
SMALL_LIMIT = 1_000_000  #: bytes, the default of `max_body`


def floods(size: int = SMALL_LIMIT) -> dict[str, dict[str, Any]]:
    """Return objects of up to `size` bytes with a flood of values, by the name of what is flooded."""
    share = size / SMALL_LIMIT

    def count(most: int) -> int:
        return int(most * share)

    return {
        "unknown": {f"unknown{i}": 0 for i in range(count(40_000))},
        "hparams": {"hparams": {f"unknown{i}": 0 for i in range(count(40_000))}},
        "checkpoints": {"checkpoints": [0] * count(300_000)},
        "strengths": {"strengths": ["x"] * count(200_000)},
        "edits": {"edits": [{}] * count(300_000)},
        "prompts": {"prompts": [0] * count(300_000)},
        "prompt": {"prompt": [-1] * count(300_000)},
        "prompt of lists": {"prompt": [[-1] * count(300_000)]},
        "placeholders": {"prompt": "{}" * count(400_000), "subject": "x" * count(100_000)},
        "stop": {"stop": ["x"] * count(200_000)},
        "versions": {"versions": [0] * count(300_000)},
        "lines of a table": {"csv": "subject,prompt,target_new\n" + "x,{} is,y\n" * count(80_000)},
        "columns of a table": {"csv": "x," * count(440_000)},
        "kinds": {"kinds": ["mlp"] * count(100_000)},
        "messages": {"messages": [{}] * count(300_000)},
        "messages of a probe": {"probes": {"paraphrase": [{"messages": [{}] * count(300_000)}]}},
        "conversations of probes": {"probes": {"paraphrase": [{"messages": []}] * count(60_000)}},
        "mentions in messages": {
            "subject": "x" * 500,
            "target_new": "y",
            "messages": [{"role": "user", "content": "{}" * 10_000}] * count(48),
        },
        "parts of a message": {"messages": [{"role": "user", "content": [{}] * count(300_000)}]},
    }


def encode(body: Any) -> bytes:
    """Return a body as compact JSON."""
    return json.dumps(body, separators=(",", ":")).encode()


def repeat_item(name: str, item: str, size: int) -> bytes:
    """Return an object of up to `size` bytes whose only member is a list that repeats an item, given as JSON."""
    count = (size - len(name) - 8) // (len(item) + 1)
    return f'{{"{name}":['.encode() + ",".join([item] * count).encode() + b"]}"


def record_floods(size: int) -> dict[str, bytes]:
    """Return bodies of up to `size` bytes for a route that reads records, by the name of what is flooded."""
    key_count = size // 12
    keys = ",".join(f'"{i:08}":0' for i in range(key_count)).encode()
    record = '{"subject":"x","prompt":"{} is","target_new":"y","case_id":1}'
    return {
        "checkpoints": repeat_item("checkpoints", "0", size),
        "empty objects": repeat_item("records", "{}", size),
        "empty lists": repeat_item("records", "[]", size),
        "numbers": repeat_item("records", "0", size),
        "one record of lists": b'{"records":[' + repeat_item("paraphrases", "[]", size - 20) + b"]}",
        "one record of keys": b'{"records":[{' + keys[: (size - 20) // 13 * 13 - 1] + b"}]}",
        "unknown keys": b"{" + keys + b"}",
        "nested lists": repeat_item("records", "[" * 190 + "]" * 190, size),
        "escapes": b'{"records":["' + b'\\"' * ((size - 20) // 2) + b'"]}',
        "one text": b'{"records":["' + b"x" * (size - 20) + b'"]}',
        "many records": repeat_item("records", record, size),
        "placeholders": encode({"records": [fact_record("x" * 50_000, "{}" * 50_000)]}),
        "bad last": b'{"records":[' + b",".join([record.encode()] * 1999) + b"," + b"[" * 100_000,
    }


def fact_record(subject: str, prompt: str) -> dict[str, Any]:
    """Return a record in the format of a fact table."""
    return {
        "subject": subject,
        "object": "y",
        "relation": "r",
        "prompts": [prompt],
        "held_out_prompts": [prompt],
    }


def largest_records(size: int, count: int = 2000) -> bytes:
    """Return a valid evaluation or training of `count` records about as many subjects, whose texts fill `size`
    bytes."""
    texts = (size // count - 200) // 8
    words = ("the word, " * (texts // 10 + 1))[: texts - 12]
    record = {
        "prompt": "{} is in",
        "target_new": "Rome",
        "target_true": "Paris",
        "paraphrases": [f"{words} {{}}"] * 6,
        "neighborhood": [{"prompt": words, "target": "Paris"}],
    }
    return encode({"records": [record | {"subject": f"Tower {number}"} for number in range(count)]})


def header_flood(tensors: int) -> bytes:
    """Return a safetensors file that declares many empty tensors."""
    entries = ",".join(
        f'"t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(tensors)
    ).encode()
    header = b"{" + entries + b"}"
    return len(header).to_bytes(8, "little") + header
