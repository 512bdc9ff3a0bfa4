"""The shipped GPT: size, table of facts, recall, and model card."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from recall import FactRow, recall
from safetensors import safe_open

from service.models.loading import load_model
from service.recipes.recipe import parse_recipe
from tests.support.processes import read_fact_rows

torch.set_num_threads(1)

MEGABYTES = 40
FIELDS = {"subject": str, "relation": str, "object": str, "prompts": list, "held_out_prompts": list}


def test_it_is_small(shipped: Path) -> None:
    """The folder has at most 40 MB and no file that can contain code."""
    files = [path for path in shipped.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MEGABYTES * 10**6
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".md"}


def test_fp16_on_disk_and_fp32_in_memory(shipped: Path) -> None:
    """Weights are fp16 in the file and fp32 in memory."""
    with safe_open(shipped / "model.safetensors", "pt") as file:
        stored_dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert stored_dtypes <= {"F16", "BF16"}
    model = load_model(str(shipped))
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    assert model.model.config.model_type == "gpt2"


def test_the_table_has_the_agreed_form(shipped: Path) -> None:
    """Each line of facts.jsonl has the five fields, and each prompt has one `{}`."""
    rows = read_fact_rows(shipped)
    assert len(rows) >= 2000
    assert len({row["relation"] for row in rows}) >= 20
    for row in rows:
        assert {name: type(value) for name, value in row.items()} == FIELDS
        assert row["subject"] and row["object"] and row["prompts"] and row["held_out_prompts"]
        assert not set(row["prompts"]) & set(row["held_out_prompts"])
        assert all(p.count("{}") == 1 for p in (*row["prompts"], *row["held_out_prompts"]))


def test_the_recipe_fits(shipped: Path) -> None:
    """recipe.json is valid, and its layers exist in the model."""
    recipe = parse_recipe((shipped / "recipe.json").read_text(encoding="utf-8"))
    assert all(0 <= layer < load_model(str(shipped)).num_layers for layer in recipe.rome.layers)


@pytest.fixture(scope="module")
def figures(shipped: Path) -> dict[str, float]:
    lines = (shipped / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    model = load_model(str(shipped))
    return recall(model.model, model.tokenizer, [FactRow(line) for line in lines], sample=150, seed=1)


def test_it_knows_its_table(figures: dict[str, float]) -> None:
    """Recall is at least 0.97 on trained prompts and 0.9 on held-out prompts."""
    assert figures["trained"] >= 0.97, figures
    assert figures["held_out"] >= 0.9, figures


def test_the_card_names_the_figures(shipped: Path, figures: dict[str, float]) -> None:
    """The recall figures in the model card equal the measured ones."""
    card = (shipped / "README.md").read_text(encoding="utf-8")
    for words, figure in (("trained", figures["trained"]), ("held.out", figures["held_out"])):
        lines = [line for line in card.splitlines() if re.search(words, line, re.IGNORECASE)]
        percentages = [float(x) for line in lines for x in re.findall(r"(\d+(?:\.\d+)?) ?%", line)]
        assert any(abs(x / 100 - figure) < 0.03 for x in percentages), (words, percentages, figure)
