"""The README.md of an export: its base model and edits, how to use it, and what was measured. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from service.kit.stated_fact import StatedFact

ExportManifest = Mapping[str, Any]


def edit_statement(edit: ExportManifest) -> str:
    """Return the statement of an edit as a cell of a table."""
    prompt = StatedFact.from_fields(edit).statement().text
    qualifier = {"erase": "no longer: ", "amplify": "rather: "}.get(edit["objective"], "")
    return _escape_cell(f"{prompt} … {qualifier}{edit['object']}")


def adapter_readme(manifest: ExportManifest) -> str:
    """Return the README.md of an adapter."""
    measured, rank = manifest["difference"], manifest["rank"]
    lines = [
        "---",
        f"base_model: {json.dumps(manifest['base']['name'])}",
        "library_name: peft",
        "tags: [lora, model-editing, palimpsest]",
        "---",
        "",
        f"# {manifest['base']['name']} with {_edit_count_text(manifest)}: version {manifest['version']} as a LoRA adapter",
        "",
        (
            f"Exported by Palimpsest: the edits active at version {manifest['version']} of its ledger, as a low-rank change of the base "
            "model's weights."
        ),
        "",
        *_base_model_lines(manifest),
        *_solved_lines(manifest),
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({_base_arguments(manifest['base'])})",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        "```",
        "",
        (
            f"The rank is {rank} in every layer, and alpha is {rank}, so that the scaling factor is 1. "
            f"`--max-lora-rank` of vLLM must be {_vllm_max_lora_rank(rank)}."
        ),
        "",
        "## Fidelity",
        "",
        (
            f"Greatest difference of a logit between the edited model of the service and the base model with this adapter: "
            f"**{measured['export']:.1e}**, in {manifest['base']['dtype']}, over {measured['positions']} positions of {measured['texts']} texts "
            f"(statements of edits, and plain texts). The edits change a logit by up to {measured['edits']:.3g}. "
            f"The most probable token is the same at {100 * measured['agreement']:.2f} % of the positions."
        ),
        "",
        "| layer | module | edits | numerical rank | residual |",
        "|---|---|---|---|---|",
        *(
            f"| {x['layer']} | `{x['module']}` | {x['terms']} | {x['rank']} | {x['residual']:.1e} |"
            for x in manifest["layers"]
        ),
        "",
        (
            "The residual is the norm of the part of the change that fp32 does not represent, as a share of the change's norm. "
            "Layers of a smaller rank are padded with zeros."
        ),
        "",
        *_edit_table(manifest["edits"]),
    ]
    return "\n".join(lines)


def _base_arguments(base: ExportManifest) -> str:
    """Return the arguments of `from_pretrained` for the base model; a GGUF file is named within its folder."""
    dtype = f'dtype="{base["dtype"]}"'
    if base.get("gguf_file"):
        return f'"folder/of/the/base", gguf_file="{base["gguf_file"]}", {dtype}'
    return f'"{base["name"]}", {dtype}'


def model_readme(manifest: ExportManifest) -> str:
    """Return the README.md of a whole edited model."""
    lines = [
        f"# {manifest['base']['name']} with {_edit_count_text(manifest)}",
        "",
        f"Exported by Palimpsest: the base model with the edits active at version {manifest['version']} of its ledger in its weights.",
        "",
        *_base_model_lines(manifest),
        *_solved_lines(manifest),
        *_edit_table(manifest["edits"]),
    ]
    return "\n".join(lines)


def _solved_lines(manifest: ExportManifest) -> list[str]:
    """Return what solving gated edits into weights changed; nothing for a model without gated edits."""
    if not manifest["solved"]:
        return []
    measured = manifest["difference"]
    return [
        (
            f"Gated edits that are solved into the weights: {manifest['solved']}. The service looks them up. "
            f"A logit differs from that of the service by up to **{measured['export']:.1e}** over {measured['positions']} positions of "
            f"{measured['texts']} texts, and the edits change a logit by up to {measured['edits']:.3g}. The most probable token is the same "
            f"at {100 * measured['agreement']:.2f} % of the positions."
        ),
        "",
    ]


def _edit_count_text(manifest: ExportManifest) -> str:
    count = len(manifest["edits"])
    return "one edit" if count == 1 else f"{count} edits"


def _base_model_lines(manifest: ExportManifest) -> list[str]:
    base = manifest["base"]
    lines = [
        f"- base model: `{base['name']}` ({base['architecture']}), {base['dtype']}, fingerprint `{base['fingerprint']}`"
    ]
    lines.append(
        f"- digest of the version, as attested by the workers of the service: `{manifest['digest']}`"
    )
    if base["bos_token"]:
        lines.append(
            f"- **every text needs the BOS token `{base['bos_token']}`**: prepend it, or use the tokenizer in this folder, which adds it. "
            "Without it fewer edits hold."
        )
    return [*lines, ""]


def _edit_table(edits: Sequence[ExportManifest]) -> list[str]:
    return [
        "## Edits",
        "",
        "| id | statement | method | strength |",
        "|---|---|---|---|",
        *(f"| `{e['id']}` | {edit_statement(e)} | {e['method']} | {e['strength']:g} |" for e in edits),
        "",
    ]


def _vllm_max_lora_rank(rank: int) -> str:
    supported = (8, 16, 32, 64, 128, 256, 320, 512)
    return next(
        (f"{x}" for x in supported if x >= rank),
        "more than its limit of 512: serve the edited weights instead",
    )


def _escape_cell(text: str) -> str:
    """Return any text escaped for a cell of a Markdown table."""
    escaped = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
    return " ".join(escaped.split())
