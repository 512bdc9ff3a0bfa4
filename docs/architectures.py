"""Writes docs/architectures.md from the table of architectures and from the tests that run on every row:
`python docs/architectures.py`. A test compares the page with the code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from transformers import CONFIG_MAPPING

from service.models.architectures import ARCHITECTURES, architecture_of
from tests.support.tiny_models import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architectures.md"
CHECKS = ROOT / "tests" / "integration" / "models" / "test_every_architecture.py"

INTRODUCTION = """# Architectures

Models of {count} types are served, edited and traced. `model_type` in `config.json` says which type a model is. This
page is written from the code and its tests by `python docs/architectures.py`.

## What was checked

Each test of `tests/integration/models/test_every_architecture.py` runs on every type and every variant of the table
below, with a tiny random model of that type. No weights are downloaded: the tests show that the computations are right,
and say nothing about how well a published model can be edited. [Tune a recipe](tune.md) for that.

| test | what it shows |
|---|---|
"""

TABLE = """
## The types

*Adds to the residual*: the module whose output the MLP adds, which traces restore. Where it is the edited weight itself
the column is empty; otherwise a norm comes between them, and an edit changes the weight before it. *Parallel*:
attention and MLP read the same input.

| type | edited weight | adds to the residual | queries, keys, values | parallel |
|---|---|---|---|---|
"""

REMARKS = """
Variants with their own tests:
{variants}.

## Where the blocks differ

* **A norm after the MLP** (`gemma2`, `gemma3_text`, `olmo2`, `olmo3`, `glm4`, `exaone4`). A trace restores the output
  of the norm. The search adds its change to the output of the down-projection, and its loss is computed through the
  norm. Methods that write several layers convert the wanted change of the hidden state to a change of the value
  ([decision 21](decisions/0021-values-behind-a-norm.md)).
* **OPT-350m** normalises each sum of a block, and projects embeddings of 512 to a hidden size of 1,024. Traces restore
  what is summed; noise has the size of the embedding.
* **Scales.** Noise is added to the output of the embedding module, and its deviation is measured there. Gemma's module
  applies the scale of the embedding itself; in Granite and BLOOM the multiplier or the norm follows, so it is applied
  to the noise too. Granite multiplies what attention and MLP add by a factor, Cohere and Granite scale the logits, and
  Gemma 2 caps them: all of that is within the forward pass that search and trace use.
* **Attention.** Gemma 2 caps its attention scores, and BLOOM, CodeGen, GPT-J, GPT-Neo and MPT have no fused attention
  in transformers: these use the eager one, which the estimates of memory count.
* **Positions.** BLOOM, MPT and some Falcon models have no positions but a bias by distance. BLOOM has no limit; the
  service uses `seq_length` of its configuration, or 2,048.
* **longrope and dynamic rotary embeddings** change the frequencies of a whole batch when one of its texts is longer
  than the original length. The service reads texts up to the original length, where no text influences another (4,096
  tokens for Phi-3-mini-128k); a longer one is refused with `422`.

## What is refused

A mixture of experts (`mixtral`, `qwen2_moe`, `olmoe`, `gpt_oss` and others): a fact may be in any of a layer's MLPs,
and an edit changes one. Encoder-decoders (`t5`, `bart`) and models that attend in both directions: edits and traces
need a causal model. Multimodal models (`gemma3`, `llava`): save the language model alone, for example as `gemma3_text`.
Any other type: the message lists those of the table. [Troubleshooting](troubleshooting.md#it-does-not-start) has the
messages.
"""


def checks() -> Iterator[tuple[str, str]]:
    """Yield the name and the first paragraph of the docstring of every test."""
    for node in ast.parse(CHECKS.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name, " ".join((ast.get_docstring(node) or "").split())


def render() -> str:
    """Return the text of the page."""
    check_rows = "".join(f"| `{name}` | {text} |\n" for name, text in checks())
    rows = "".join(_table_row(name) for name in sorted(ARCHITECTURES))
    variants = ", ".join(f"`{name}`" for name in sorted(VARIANTS))
    return (
        INTRODUCTION.format(count=len(ARCHITECTURES))
        + check_rows
        + TABLE
        + rows
        + REMARKS.format(variants=variants)
    )


def _table_row(name: str) -> str:
    """Return the row of a type, as its default configuration has it."""
    row = architecture_of(CONFIG_MAPPING[name]())
    output = f"`{row.mlp_output}`" if row.mlp_output else ""
    fused = f"fused, `{row.attention_projections[0]}`" if len(row.attention_projections) == 1 else "separate"
    parallel = "yes" if row.parallel else ""
    return f"| `{name}` | `{row.down_proj}` | {output} | {fused} | {parallel} |\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
