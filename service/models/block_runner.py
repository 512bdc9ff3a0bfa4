"""Run the parts of a model one at a time: the layers before its blocks, each block, and the layers after them.

The arguments of each block (masks, rotary angles, positions) are captured from the model's own forward pass, so this
module is independent of the architecture. No hook or stub remains between two calls. Gradients flow through `run` and
`logits` to a `hidden` that requires them; weights do not require gradients.
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
    """Inputs of the blocks for consecutive positions: the input of block 0, and the arguments of each block."""

    hidden: Tensor  #: (rows, positions, d)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    cache: DynamicCache  #: placeholder in the arguments for the keys and values of earlier positions


class _KVComplete(Exception):
    """Raised when a block has produced its keys and values and the rest of it is not needed."""


class _LayerCache:
    """A cache for one block: `update` appends the new keys and values to those of earlier positions."""

    def __init__(self, past: LayerKV | None, stop_after_update: bool = False) -> None:
        self.past, self.stop_after_update = past, stop_after_update

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> LayerKV:
        if self.past is not None and self.past[0].shape[-2]:
            keys, values = torch.cat([self.past[0], keys], -2), torch.cat([self.past[1], values], -2)
        self.past = keys, values
        if self.stop_after_update:
            raise _KVComplete
        return self.past

    def get_seq_length(self, *_: Any) -> int:
        return 0 if self.past is None else self.past[0].shape[-2]


class BlockRunner:
    """Runs single blocks of one model."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        # GPT-J's blocks return a tuple; those of the other architectures return a tensor.
        self._returns_tuple = self._detect_tuple_outputs()

    def capture_block_inputs(
        self,
        ids: Tensor,
        start: int,
        edit_embeddings: Callable[[Tensor], Tensor] | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> BlockInputs:
        """Return the block inputs of token ids (rows, positions) that follow `start` earlier positions.

        `edit_embeddings` receives the embeddings and returns what replaces them. Without `positions`, every row has the
        positions start, start + 1, ...; padded rows pass their own (rows, positions) and a `mask` (rows, start +
        positions).
        """
        model = self.model
        if positions is None:  # masks and angles of one row apply to any number of rows
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
        return BlockInputs(hidden_states[0].to(model.device), calls, cache)  # block 0 may lie elsewhere

    def run(
        self, inputs: BlockInputs, layer: int, hidden: Tensor, past: LayerKV | None
    ) -> tuple[Tensor, LayerKV]:
        """Run one block. Return its output (rows, positions, d) and the keys and values of all positions."""
        cache = _LayerCache(past)
        out = self._call(inputs, layer, hidden, cache)
        assert cache.past is not None
        return (out[0] if self._returns_tuple else out), cache.past

    def run_kv_only(self, inputs: BlockInputs, layer: int, hidden: Tensor, past: LayerKV | None) -> LayerKV:
        """Return the keys and values of one block without computing its output, for positions that are only attended
        to."""
        cache = _LayerCache(past, stop_after_update=True)
        with suppress(_KVComplete):
            self._call(inputs, layer, hidden, cache)
        assert cache.past is not None
        return cache.past

    def _call(self, inputs: BlockInputs, layer: int, hidden: Tensor, cache: _LayerCache) -> Any:
        args, kwargs = inputs.calls[layer]
        args = tuple(cache if a is inputs.cache else a for a in args)
        kwargs = {k: cache if v is inputs.cache else v for k, v in kwargs.items()}
        if name := self.model.architecture.rows_argument:
            kwargs[name] = _repeat_rows(kwargs[name], len(hidden) // len(inputs.hidden))
        return self.model.block(layer)(hidden, *args, **kwargs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (rows, V) of the last block's output (rows, d): final norm and head."""
        rows = torch.zeros(
            len(hidden), 1, dtype=torch.long, device=hidden.device
        )  # StarCoder reads their number
        with self._stubbed_blocks(lambda *_: hidden[:, None]):
            return self._run(rows, rows, None).logits[:, 0]  # type: ignore[no-any-return]

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
        """Replace the forward method of every block by `replacement(layer, hidden, args, kwargs)` within the
        context."""

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


def _repeat_rows(argument: Tensor, times: int) -> Tensor:
    """Return an argument of one row's heads, for that many equal rows."""
    return argument if times == 1 else argument.repeat(times, *[1] * (argument.ndim - 1))
