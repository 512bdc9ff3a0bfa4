"""Loads the model and the tokenizer of a GGUF file.

transformers reads such files too, but drops tensors and metadata that it does not know, holds the weights twice and
takes ten times as long (docs/decisions/0020-gguf.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from service.errors import Misconfigured
from service.models.gguf_architectures import (
    HEAD,
    ROPE_FACTORS,
    GgufArchitecture,
    gguf_architecture,
    gguf_config,
    has_tied_head,
)
from service.models.gguf_file import GgufFile, GgufTensor, read_gguf

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # kinds of tokenizers
#: names of splits of text before byte-level merges, as llama.cpp calls them: those of GPT-2, ...
GPT2_SPLITS = ("gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2")
#: ... those with single digits, ...
DIGIT_SPLITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
#: ... and those that transformers sets itself
KNOWN_SPLITS = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "megrez",
    "gpt-4o",
)  # fmt: skip


@dataclass(frozen=True)
class LayoutChange:
    """A tensor of a file, converted to the layout of transformers when it is indexed."""

    tensor: GgufTensor
    heads: int = 0  #: of a projection whose rotary halves are interleaved; 0: none
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[::-1] if self.transposed else self.tensor.shape

    def __getitem__(self, index: object) -> Tensor:
        values = self.tensor[index]
        if self.heads:
            pairs = values.view(self.heads, -1, 2, *values.shape[1:])
            values = pairs.transpose(1, 2).reshape(values.shape)
        return values.T.contiguous() if self.transposed else values


def read_gguf_checkpoint(
    path: Path, dtype: torch.dtype
) -> tuple[Any, PreTrainedTokenizerFast, dict[str, Any]]:
    """Return the model, its tokenizer and the loading information of transformers. The weights are dequantised one by
    one, so that the memory for them is needed once."""
    if not path.is_file():
        raise Misconfigured(f"there is no file {str(path)!r}: give the path of a GGUF file.")
    file = read_gguf(path)
    if file.metadata.get("split.count", 0) > 1:
        raise Misconfigured(
            f"the model {str(path)!r} is one of {file.metadata['split.count']} parts: merge them with llama-gguf-split."
        )
    config = gguf_config(file)
    tokenizer = read_tokenizer(file)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    state = state_dict(file, config, list(empty.state_dict()), dtype)
    model, report = type(empty).from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model.config._name_or_path = ""  # else the text "None"
    model.config.architectures = [
        type(model).__name__
    ]  # as in a saved folder, which so has the same fingerprint
    return model, tokenizer, report


def state_dict(file: GgufFile, config: Any, names: list[str], dtype: torch.dtype) -> dict[str, LayoutChange]:
    """Return the tensors of a file by their names in the model. A tensor that the model does not have keeps the name in
    the file, so that the loading information reports it."""
    row = gguf_architecture(file)
    name_map = get_tensor_name_map(_gguf_model(file.architecture), config.num_hidden_layers)
    ours = {}
    for name in names:
        module, _, suffix = name.rpartition(".")
        if stored := name_map.get_name(module):
            ours[f"{stored}.{suffix}"] = name
    ignored = {ROPE_FACTORS, *([HEAD] if has_tied_head(file) else ())}
    return {
        ours.get(stored, stored): _converted(file, stored, row, config, dtype)
        for stored in file.positions
        if stored not in ignored
    }


def _gguf_model(architecture: str) -> MODEL_ARCH:
    return next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)


def _converted(
    file: GgufFile, name: str, row: GgufArchitecture, config: Any, dtype: torch.dtype
) -> LayoutChange:
    heads = next((getattr(config, key) for part, key in row.permuted.items() if part in name), 0)
    return LayoutChange(file.tensor(name, dtype), heads, any(part in name for part in row.transposed))


def read_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a file with its chat template. Raise Misconfigured when it has none or one that is not
    known exactly."""
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in (BYTE_LEVEL, SENTENCEPIECE) or not file.metadata.get("tokenizer.ggml.tokens"):
        found = f"a tokenizer of the kind {kind!r}" if kind else "no tokenizer"
        raise Misconfigured(
            f"the model {str(file.path)!r} has {found}, and its texts cannot be read: give a GGUF file with a tokenizer of "
            f"the kind {BYTE_LEVEL!r} or {SENTENCEPIECE!r}, or a folder with tokenizer.json."
        )
    split = _split_name(file) if kind == BYTE_LEVEL else ""
    if kind == SENTENCEPIECE and not file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        raise _unknown_tokenizer(file, "adds no space before a text (add_space_prefix)")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(file.path.parent, gguf_file=file.path.name)
    if split in DIGIT_SPLITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    return tokenizer


def _split_name(file: GgufFile) -> str:
    """Return the name of the tokenizer's split; files of GPT-2 need not have it."""
    name = str(file.metadata.get("tokenizer.ggml.pre", "default"))
    if name == "default" and file.architecture == "gpt2":
        return "gpt-2"
    if name not in (*GPT2_SPLITS, *DIGIT_SPLITS, *KNOWN_SPLITS):
        raise _unknown_tokenizer(
            file, f"splits texts in a way that is not known (tokenizer.ggml.pre is {name!r})"
        )
    return name


def _unknown_tokenizer(file: GgufFile, reason: str) -> Misconfigured:
    return Misconfigured(
        f"the tokenizer of the model {str(file.path)!r} {reason}: give the model as a folder with tokenizer.json."
    )
