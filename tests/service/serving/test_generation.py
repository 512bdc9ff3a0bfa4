"""Decoding: rows side by side say what each says alone."""

from __future__ import annotations

import pytest
import torch
from tiny import MODEL_TYPES, tiny

from service.errors import InvalidInput
from service.models.loading import LoadedModel
from service.requests import Sampling
from service.serving.generation import Batch, Row, end_tokens, next_tokens, row

torch.set_num_threads(1)

PROMPTS = [
    "The Eiffel Tower is located in the city of",
    "Big Ben",
    "In which country is Mount Fuji? It rises in",
    "São",
]


def run(model: LoadedModel, rows: list[Row]) -> list[Row]:
    batch = Batch(model, rows)
    while len(batch):
        batch.step()
    return rows


def alone(model: LoadedModel, prompt: str, asked: Sampling) -> list[int]:
    return run(model, [row(model, prompt, asked)])[0].said


def reference(model: LoadedModel, prompt: str, count: int) -> list[int]:
    """Greedy tokens of transformers' own generate(), without the end-of-text token."""
    ids = torch.tensor([model.encode(prompt)[0]])
    out = model.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    said = out[0, ids.shape[1] :].tolist()
    return said[: said.index(0)] if 0 in said else said


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("bos", [False, True])
def test_a_padded_batch_says_what_generate_says(model_type: str, bos: bool) -> None:
    """Left-padded rows of unequal length say, greedily, what transformers' generate() says for each alone."""
    model = tiny(model_type, bos=bos)
    asked = Sampling(max_new_tokens=12)
    rows = run(model, [row(model, p, asked) for p in PROMPTS])
    assert [r.said for r in rows] == [reference(model, p, 12) for p in PROMPTS]
    assert len({tuple(r.said) for r in rows}) > 1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_rows_join_and_leave_between_steps(model_type: str) -> None:
    """Rows of different lengths that join late and leave early say what they say alone."""
    model = tiny(model_type)
    asked = [Sampling(max_new_tokens=n, temperature=1.0, seed=n) for n in (3, 20, 11, 7)]
    rows = [row(model, p, a) for p, a in zip(PROMPTS, asked, strict=True)]
    batch = Batch(model, rows[:1])
    batch.step()
    for late in rows[1:]:
        joining = Batch(model, [late])
        joining.step()
        batch.join(joining)
        batch.step()
    while len(batch):
        batch.step()
    assert [r.said for r in rows] == [alone(model, p, a) for p, a in zip(PROMPTS, asked, strict=True)]
    assert len({r.said[1] for r in rows}) > 1


def test_a_sliding_window_is_respected() -> None:
    """A model whose attention reaches back only a few tokens says in a batch what generate() says."""
    model = tiny("mistral")
    model.model.config.sliding_window = 4
    model.model.config.layer_types = ["sliding_attention"] * 3
    full = [reference(tiny("mistral"), p, 12) for p in PROMPTS]
    wanted = [reference(model, p, 12) for p in PROMPTS]
    assert wanted != full
    assert [
        r.said for r in run(model, [row(model, p, Sampling(max_new_tokens=12)) for p in PROMPTS])
    ] == wanted


@pytest.mark.parametrize("seed", range(4))
def test_the_seed_decides_whatever_runs_beside(seed: int) -> None:
    """A request of one seed says the same alone and beside others; other seeds say other things."""
    model = tiny("gpt2")
    asked = [
        Sampling(max_new_tokens=15, temperature=t, top_k=k, top_p=p, seed=seed + 10 * i)
        for i, (t, k, p) in enumerate([(1.0, None, 1.0), (0.7, 40, 1.0), (1.5, None, 0.9), (1.0, 5, 0.5)])
    ]
    rows = run(model, [row(model, p, a) for p, a in zip(PROMPTS, asked, strict=True)])
    assert [r.said for r in rows] == [alone(model, p, a) for p, a in zip(PROMPTS, asked, strict=True)]
    other = asked[0].model_copy(update={"seed": seed + 1000})
    assert alone(model, PROMPTS[0], other) != rows[0].said


def test_the_last_position_ends_a_row() -> None:
    """Prompt and answer together never exceed the model's positions; beyond them nothing is admitted."""
    model = tiny("gpt2", positions=16)
    r = run(model, [row(model, PROMPTS[0], Sampling(max_new_tokens=500))])[0]
    assert len(r.ids) == 16 and r.finish_reason == "length"
    with pytest.raises(InvalidInput):
        row(model, PROMPTS[0] * 4, Sampling())


def test_the_end_token_stops_and_is_not_said() -> None:
    """A row ends at the end-of-text token with reason stop, and the token is not in its text."""
    model = tiny("gpt2")
    wanted = alone(model, PROMPTS[0], Sampling(max_new_tokens=8))
    batch = Batch(model, [row(model, PROMPTS[0], Sampling(max_new_tokens=8))])
    batch._ends = frozenset({wanted[3]})
    r = batch.rows[0]
    while len(batch):
        batch.step()
    assert r.said == wanted[: wanted.index(wanted[3])] and r.finish_reason == "stop"
    assert 0 in end_tokens(model)


def test_pieces_make_the_text() -> None:
    """The pieces of the steps concatenate to the row's text, which is the text of its tokens."""
    model = tiny("llama")
    rows = [
        row(model, p, Sampling(max_new_tokens=25, temperature=2.0, seed=i)) for i, p in enumerate(PROMPTS)
    ]
    batch, pieces = Batch(model, rows), dict.fromkeys(map(id, rows), "")
    while len(batch):
        for said in batch.step():
            pieces[id(said.row)] += said.piece
    for r in rows:
        assert pieces[id(r)] == r.text
        assert r.text.rstrip("\ufffd") == model.decode(r.said).rstrip("\ufffd")


def test_a_cancelled_row_leaves() -> None:
    """A row that is cancelled between steps says no more, and its neighbours go on undisturbed."""
    model = tiny("gpt2")
    asked = Sampling(max_new_tokens=10)
    rows = [row(model, p, asked) for p in PROMPTS[:3]]
    batch = Batch(model, rows)
    batch.step()
    rows[2].finish("cancelled")
    while len(batch):
        batch.step()
    assert len(rows[2].said) == 1 and rows[2].finish_reason == "cancelled"
    assert [r.said for r in rows[:2]] == [alone(model, p, asked) for p in PROMPTS[:2]]


def test_a_failed_step_can_be_tried_again() -> None:
    """When a pass fails, no row has lost or gained a token, and each can go on alone."""
    model = tiny("gpt2")
    asked = Sampling(max_new_tokens=10, temperature=1.0, seed=3)
    rows = [row(model, p, asked) for p in PROMPTS]
    batch = Batch(model, rows)
    for _ in range(3):
        batch.step()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.down(1).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        batch.step()
    handle.remove()
    for single in batch.split():
        while len(single):
            single.step()
    assert [r.said for r in rows] == [alone(model, p, asked) for p in PROMPTS]


def test_a_row_without_numbers_fails_alone() -> None:
    """A row whose logits are not numbers ends with an error; the others go on."""
    model = tiny("gpt2")
    rows = [row(model, p, Sampling(max_new_tokens=4)) for p in PROMPTS[:2]]
    batch = Batch(model, rows)
    batch.step()

    def spoil(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[1:] = float("nan")
        return output

    handle = model.head.register_forward_hook(spoil)
    while len(batch):
        batch.step()
    handle.remove()
    assert rows[1].finish_reason == "error" and len(rows[1].said) == 1
    assert rows[0].said == alone(model, PROMPTS[0], Sampling(max_new_tokens=4))


def test_next_tokens_is_the_models_distribution() -> None:
    """The distribution after a prompt sums to one and equals the softmax of the model's last logits."""
    model = tiny("gpt_neox")
    ids = model.encode(PROMPTS[0])[0]
    p = next_tokens(model, ids)
    with torch.no_grad():
        wanted = model.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    torch.testing.assert_close(p, wanted, rtol=1e-5, atol=1e-9)
