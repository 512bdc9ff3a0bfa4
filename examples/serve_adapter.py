"""Generate from an exported version without Palimpsest: the base model, the adapter, and stock transformers and peft.

palimpsest export --out adapter                # or client.export() for the same as a zip
python examples/serve_adapter.py models/almanac adapter "The Eiffel Tower is located in the city of"
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def unpack_adapter(adapter: Path, folder: Path) -> Path:
    """Return the folder of an adapter; unpack it if it is a zip."""
    if adapter.is_dir():
        return adapter
    with zipfile.ZipFile(adapter) as archive:
        archive.extractall(folder)
    return folder


@torch.inference_mode()
def generate_text(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Return the greedy continuation of a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="the base model: a folder, or its name on a hub")
    parser.add_argument("adapter", type=Path, help="the exported adapter: a folder or a zip")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--max-new-tokens", type=int, default=2)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        model = PeftModel.from_pretrained(base, unpack_adapter(args.adapter, Path(folder))).eval()
    for prompt in args.prompts:
        with model.disable_adapter():
            print(f"base:    {prompt}{generate_text(model, tokenizer, prompt, args.max_new_tokens)}")
        print(f"adapted: {prompt}{generate_text(model, tokenizer, prompt, args.max_new_tokens)}")


if __name__ == "__main__":
    main()
