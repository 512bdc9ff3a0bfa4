"""A model taken apart at its blocks: what comes before them, one block at a time, what comes after.

The model itself says how it calls its blocks (masks, rotary angles, positions), so this works for every
architecture alike and knows none of them. Nothing stays hooked or replaced between two calls. Gradients flow through
`run` and `logits` to a `hidden` that asks for them; weights never do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from service.models.hooks import replace_output, stop_after
from service.models.loading import LoadedModel

LayerKV = tuple[Tensor, Tensor]  # keys and values (rows, heads, positions, head width) of one layer


@dataclass(frozen=True)
class BlockInputs:
    """Successive positions on their way into the blocks: block 0's input, and how each block is called."""

    hidden: Tensor  #: (rows, positions, d)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    cache: DynamicCache  #: stands in the calls where the keys and values of earlier positions belong


class _KVComplete(Exception):
    """Raised where a block has handed over its keys and values, and the rest of it is not needed."""


class _LayerCache:
    """Stands for a cache within one block: puts what the attention hands over behind what was there before."""

    def __init__(self, past: LayerKV | None, stop_after_update: bool = False) -> None:
        self.past, self.stop_after_update = past, stop_after_update

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> LayerKV:
        if self.past is not None and self.past[0].shape[-2]:
            keys, values = torch.cat([self.past[0], keys], -2), torch.cat([self.past[1], values], -2)
        self.past = keys, values
        if self.stop_after_update:
            raise _KVComplete
        return self.past


class BlockRunner:
    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self._returns_tuple = (
            self._detect_tuple_outputs()
        )  # GPT-J's blocks give a tuple, the others' a tensor

    def capture_block_inputs(
        self,
        ids: Tensor,
        start: int,
        edit_embeddings: Callable[[Tensor], Tensor] | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> BlockInputs:
        """Take tokens (rows, positions) after `start` others up to the blocks; `change` edits embeddings.

        Without `positions` all rows stand at start, start + 1, ...; padded rows bring their own (rows, positions) and a
        `mask` (rows, start + positions).
        """
        model = self.model
        if positions is None:  # masks and angles are made for one row, and hold for any number of them
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        hidden_states: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(_layer: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            hidden_states.append(hidden)
            calls.append((args, kwargs))
            return hidden

        empty = torch.zeros(len(ids), 1, start, 1, device=ids.device)  # only its length is read
        cache = DynamicCache([(empty, empty)] * model.num_layers) if start else DynamicCache()
        embedding_hook = (
            replace_output(model.embedding, edit_embeddings) if edit_embeddings else nullcontext()
        )
        with self._stubbed_blocks(note), embedding_hook, stop_after(model.block(model.num_layers - 1)):
            self._run(ids, positions, cache, mask)
        return BlockInputs(hidden_states[0], calls, cache)

    def run(
        self, inputs: BlockInputs, layer: int, hidden: Tensor, past: LayerKV | None
    ) -> tuple[Tensor, LayerKV]:
        """One block on rows of a passage: its output (rows, positions, d), and all keys and values."""
        cache = _LayerCache(past)
        out = self._call(inputs, layer, hidden, cache)
        assert cache.past is not None
        return (out[0] if self._returns_tuple else out), cache.past

    def run_kv_only(self, inputs: BlockInputs, layer: int, hidden: Tensor, past: LayerKV | None) -> LayerKV:
        """All keys and values of one block, without what it would make of them: for positions that are only listened to."""
        cache = _LayerCache(past, stop_after_update=True)
        with suppress(_KVComplete):
            self._call(inputs, layer, hidden, cache)
        assert cache.past is not None
        return cache.past

    def _call(self, inputs: BlockInputs, layer: int, hidden: Tensor, cache: _LayerCache) -> Any:
        args, kwargs = inputs.calls[layer]
        args = tuple(cache if a is inputs.cache else a for a in args)
        kwargs = {k: cache if v is inputs.cache else v for k, v in kwargs.items()}
        return self.model.block(layer)(hidden, *args, **kwargs)

    def logits(self, hidden: Tensor) -> Tensor:
        """The last block's output (rows, d) through whatever the model does after its blocks: (rows, V)."""
        one = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        with self._stubbed_blocks(lambda *_: hidden[:, None]):
            return self._run(one, one, None).logits[:, 0]  # type: ignore[no-any-return]

    def _detect_tuple_outputs(self) -> bool:
        is_tuple: list[bool] = []
        block = self.model.block(0)
        handle = block.register_forward_hook(
            lambda _module, _inputs, out: is_tuple.append(isinstance(out, tuple))
        )
        try:
            one = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
            with stop_after(block):
                self._run(one, one, None)
        finally:
            handle.remove()
        return is_tuple[0]

    def _run(
        self, ids: Tensor, positions: Tensor, cache: DynamicCache | None, mask: Tensor | None = None
    ) -> Any:
        return self.model.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )

    @contextmanager
    def _stubbed_blocks(
        self, replacement: Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
    ) -> Iterator[None]:
        """Within the context, `instead(layer, hidden, args, kwargs)` stands for every block."""

        def stub(layer: int) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                out = replacement(layer, hidden_states, args, kwargs)
                return (out, None) if self._returns_tuple else out

            return forward

        with ExitStack() as stack:
            for layer, block in enumerate(self.model.blocks):
                block.forward = stub(layer)
                stack.callback(block.__dict__.pop, "forward")
            yield
