"""The module paths of each supported architecture: one frozen row for each `config.model_type`.

In every row the MLP's output, in evaluation mode, is the output of its down-projection. One path therefore names both
the weight that ROME edits and the module whose output traces read and restore.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import Misconfigured


@dataclass(frozen=True)
class Architecture:
    """One row of the table. Paths are relative to the model, or to a block where a comment says so."""

    model_type: str
    embedding: str  #: token embedding; its output is where traces add noise
    blocks: str  #: the list of blocks
    attention: str  #: within a block: the attention module (output after its projection)
    down_proj: str  #: within a block: the MLP's down-projection (the edited weight)
    final_norm: str  #: final normalisation
    lm_head: str  #: output embedding
    #: within a block: the projections that compute queries, keys and values, fused or separate
    attention_projections: tuple[str, ...]
    conv1d: bool = False  #: weights stored (in, out) as in GPT-2's Conv1D, not (out, in) as in nn.Linear
    parallel: bool = False  #: attention and MLP read the same input (GPT-J, GPT-NeoX)


GPT2 = Architecture(
    "gpt2",
    "transformer.wte",
    "transformer.h",
    "attn",
    "mlp.c_proj",
    "transformer.ln_f",
    "lm_head",
    ("attn.c_attn",),
    conv1d=True,
)
GPTJ = Architecture(
    "gptj",
    "transformer.wte",
    "transformer.h",
    "attn",
    "mlp.fc_out",
    "transformer.ln_f",
    "lm_head",
    ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    parallel=True,
)
NEOX = Architecture(
    "gpt_neox",
    "gpt_neox.embed_in",
    "gpt_neox.layers",
    "attention",
    "mlp.dense_4h_to_h",
    "gpt_neox.final_layer_norm",
    "lm_head",
    ("attention.query_key_value",),
    parallel=True,
)
OPT = Architecture(
    "opt",
    "model.decoder.embed_tokens",
    "model.decoder.layers",
    "self_attn",
    "fc2",
    "model.decoder.final_layer_norm",
    "lm_head",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)


def _llama_like(model_type: str) -> Architecture:
    return Architecture(
        model_type,
        "model.embed_tokens",
        "model.layers",
        "self_attn",
        "mlp.down_proj",
        "model.norm",
        "lm_head",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    )


ARCHITECTURES = {
    a.model_type: a
    for a in (GPT2, GPTJ, NEOX, OPT, *map(_llama_like, ("llama", "mistral", "qwen2", "qwen3")))
}


def architecture_of(model_type: str) -> Architecture:
    """Return the row of a `config.model_type`. Raise Misconfigured for a type that is not supported."""
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise Misconfigured(
            f"models of type {model_type!r} are not supported; the types that are: {supported}."
        ) from None
