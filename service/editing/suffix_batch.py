"""Forward passes over the suffixes of texts: the positions from the subject's edited token on, above the edited layer.

Nothing constant is computed twice. What precedes the edited token is run once and leaves keys and values. The
blocks up to the edited one are run once and leave hidden states, in the pass that also reads the keys and the initial
value. A step of the optimization runs the blocks above on a few positions of each row, and the last block where its
output is read. Rows of several edits of one layer are in one batch; an edit does not influence the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from service.editing.subject_noise import EmbeddingHook, noise_hooks_split
from service.models.block_runner import BlockInputs, BlockRunner, LayerKV
from service.models.hooks import capture, replace_output
from service.models.loading import LoadedModel
from service.models.token_batch import PaddedBatch, TokenizedStatement, pad


@dataclass(frozen=True)
class DeltaSite:
    """The place where delta is added: the output of a layer's down-projection, or the hidden state after the layer."""

    layer: int
    on_hidden_state: bool = False


@dataclass(frozen=True)
class SuffixBatch:
    """The suffixes (B, A) of texts, whose column 0 is the subject's edited token, and the constant inputs of a step.

    By causality the positions before the suffix and the blocks below the edited one do not depend on delta. Keys and
    values of the former and hidden states of the latter are stored.
    """

    block_runner: BlockRunner
    ids: Tensor  #: (B, A) right-padded
    mask: Tensor  #: (B, P + A), over the left-padded prefixes and the suffixes
    positions: Tensor  #: (B, A)
    past: list[LayerKV | None]  #: keys and values of the prefixes, by layer
    block_inputs: BlockInputs
    hidden: Tensor  #: (B, A, d), the input of block `first_layer`
    first_layer: int
    delta_module: (
        nn.Module | None
    )  #: the module of block `first_layer` to whose output delta is added; None: delta is added to `hidden`
    later_mentions: Tensor | None = None  #: (B, A), true where delta is added in addition to column 0

    def select_rows(self, rows: Tensor) -> SuffixBatch:
        """Return a batch of some of the rows."""
        ids, mask, positions = self.ids[rows], self.mask[rows], self.positions[rows]
        past = [_rows_of(p, rows) for p in self.past]
        mentions = None if self.later_mentions is None else self.later_mentions[rows]
        mentions = None if mentions is None or not mentions.any() else mentions
        selected = replace(
            self,
            ids=ids,
            mask=mask,
            positions=positions,
            past=past,
            hidden=self.hidden[rows],
            later_mentions=mentions,
        )
        return replace(selected, block_inputs=selected.inputs_for(0, ids.shape[1]))

    def inputs_for(self, first: int, end: int, rows: Tensor | slice = slice(None)) -> BlockInputs:
        """Return the inputs that blocks take for columns [first, end) of some rows."""
        before = self.mask.shape[1] - self.ids.shape[1]
        ids, positions = self.ids[rows, first:end], self.positions[rows, first:end]
        return self.block_runner.capture_block_inputs(
            ids, before + first, None, positions, self.mask[rows, : before + end]
        )

    def forward(self, change: Tensor, end: int | None = None) -> Tensor:
        """Return the output (B, A, d) of block `end - 1`, or of the last block, when `change` (B, d) is added at the
        subject's edited token, and at that of its later mentions."""

        def add(output: Tensor) -> Tensor:
            shaped = output.view(*self.ids.shape, -1)
            change_here = change.to(shaped)
            shaped[:, 0] += change_here
            if self.later_mentions is not None:
                mentions = self.later_mentions.to(shaped.device)
                shaped += mentions[..., None] * change_here[:, None]
            return output

        hidden = self.hidden if self.delta_module else add(self.hidden.clone())
        for layer in range(self.first_layer, self.block_runner.model.num_layers if end is None else end):
            delta_module = self.delta_module if layer == self.first_layer else None
            with replace_output(delta_module, add) if delta_module else nullcontext():
                hidden, _ = self.block_runner.run(self.block_inputs, layer, hidden, self.past[layer])
        return hidden


class LastBlockReader:
    """Reads the output of the last block at given positions (row, column), (N,) each.

    The loss reads the columns of the object's tokens, at the end of the rows, and column 0 of a few rows. Elsewhere
    the last block only computes keys and values.
    """

    def __init__(self, suffix_batch: SuffixBatch, row: Tensor, column: Tensor) -> None:
        self.suffix_batch, self.row, self.column = suffix_batch, row, column
        self.layer, width = suffix_batch.block_runner.model.num_layers - 1, suffix_batch.ids.shape[1]
        in_tail = column > 0
        self.tail_start = int(column[in_tail].min()) if bool(in_tail.any()) else 0
        delta_in_last_block = suffix_batch.first_layer == self.layer and suffix_batch.delta_module is not None
        self.runs_whole_block = (
            self.tail_start < 2 or suffix_batch.first_layer > self.layer or delta_in_last_block
        )
        if self.runs_whole_block:
            return
        self.first_column_rows = row[~in_tail]
        self.head_inputs = suffix_batch.inputs_for(0, self.tail_start)
        self.tail_inputs = suffix_batch.inputs_for(self.tail_start, width)
        if len(self.first_column_rows):
            self.first_column_inputs = suffix_batch.inputs_for(0, 1, self.first_column_rows)
        self.gather_index = torch.empty_like(row)
        self.gather_index[in_tail] = (
            row[in_tail] * (width - self.tail_start) + column[in_tail] - self.tail_start
        )
        self.gather_index[~in_tail] = len(suffix_batch.ids) * (width - self.tail_start) + torch.arange(
            len(self.first_column_rows), device=row.device
        )

    def __call__(self, change: Tensor) -> Tensor:
        """Return the output (N, d) when `change` (B, d) is added at the subject's edited token."""
        if self.runs_whole_block:
            return self.suffix_batch.forward(change)[self.row, self.column]
        blocks, layer, tail_start = self.suffix_batch.block_runner, self.layer, self.tail_start
        hidden, past = self.suffix_batch.forward(change, layer), self.suffix_batch.past[layer]
        head_past = blocks.run_kv_only(self.head_inputs, layer, hidden[:, :tail_start], past)
        tail_hidden, _ = blocks.run(self.tail_inputs, layer, hidden[:, tail_start:], head_past)
        if not len(self.first_column_rows):
            return tail_hidden.flatten(0, 1)[self.gather_index]
        first_column_past = _rows_of(past, self.first_column_rows)
        first_column_hidden, _ = blocks.run(
            self.first_column_inputs, layer, hidden[self.first_column_rows, :1], first_column_past
        )
        return torch.cat([tail_hidden.flatten(0, 1), first_column_hidden[:, 0]])[self.gather_index]


def _rows_of(past: LayerKV | None, rows: Tensor) -> LayerKV | None:
    """Return some rows of a layer's keys and values, on their device."""
    if past is None:
        return None
    index = rows.to(past[0].device)
    return past[0][index], past[1][index]


@dataclass(frozen=True)
class PrefillActivations:
    """Activations of the first pass over all rows, at the subject's edited token, on the model's main device."""

    keys: Tensor  #: (rows, D)
    values: Tensor  #: (rows, d), the down-projection's output
    initial: Tensor  #: (rows, d), what delta is added to


def prefill_suffixes(
    model: LoadedModel,
    texts: Sequence[TokenizedStatement],
    delta_site: DeltaSite,
    noises: Sequence[Tensor | None] = (),
    later_mentions: Sequence[tuple[int, int]] = (),
) -> tuple[SuffixBatch, PrefillActivations]:
    """Run the prefixes through all blocks and the suffixes up to the edited one. `noises`: for each text the noise
    (n, d) on its subject, or None. `later_mentions`: texts and positions at which delta is added as well."""
    blocks, starts = BlockRunner(model), [t.edited_index for t in texts]
    prefixes = pad([t.ids[:s] for t, s in zip(texts, starts, strict=True)], model, side="left")
    suffix_tokens = pad([t.ids[s:] for t, s in zip(texts, starts, strict=True)], model)
    noise_hooks = noise_hooks_split(texts, noises or [None] * len(texts), prefixes.ids.shape[1])
    past = _run_prefixes(model, blocks, prefixes, noise_hooks[0])
    mask = torch.cat([prefixes.mask, suffix_tokens.mask], 1)
    positions = torch.tensor(starts, device=model.device)[:, None] + suffix_tokens.positions
    block_inputs = blocks.capture_block_inputs(
        suffix_tokens.ids, prefixes.ids.shape[1], noise_hooks[1], positions, mask
    )
    hidden = block_input = block_inputs.hidden
    down = model.down_proj(delta_site.layer)
    with capture({0: down}, "input") as keys, capture({0: down}) as values:
        for layer in range(delta_site.layer + 1):
            block_input = hidden
            hidden, _ = blocks.run(block_inputs, layer, hidden, past[layer])
    resume_point: tuple[int, Tensor, nn.Module | None] = (delta_site.layer + 1, hidden, None)
    at = slice(None), 0
    outputs = values[0].reshape(*suffix_tokens.ids.shape, -1)[at].to(model.device, copy=True)
    if not delta_site.on_hidden_state and not _is_additive(
        blocks, block_inputs, delta_site.layer, block_input, hidden, past[delta_site.layer]
    ):
        resume_point = (delta_site.layer, block_input, down)
    suffixes = SuffixBatch(
        blocks,
        suffix_tokens.ids,
        mask,
        positions,
        past,
        block_inputs,
        resume_point[1],
        resume_point[0],
        resume_point[2],
        _mention_mask(suffix_tokens.ids, [(text, at - starts[text]) for text, at in later_mentions]),
    )
    subject_keys = keys[0].reshape(*suffix_tokens.ids.shape, -1)[at].to(model.device, copy=True)
    return suffixes, PrefillActivations(
        subject_keys, outputs, hidden[at].clone() if delta_site.on_hidden_state else outputs
    )


def _mention_mask(ids: Tensor, mentions: Sequence[tuple[int, int]]) -> Tensor | None:
    """Return a mask (B, A) of rows and columns; None without any."""
    if not mentions:
        return None
    mask = torch.zeros_like(ids, dtype=torch.bool)
    rows, columns = zip(*mentions, strict=True)
    mask[list(rows), list(columns)] = True
    return mask


def _run_prefixes(
    model: LoadedModel, blocks: BlockRunner, prefixes: PaddedBatch, noise_hook: EmbeddingHook | None
) -> list[LayerKV | None]:
    """Return keys and values of the prefixes, by layer. A row without a prefix is all padding."""
    if not prefixes.ids.shape[1]:
        return [None] * model.num_layers
    block_inputs = blocks.capture_block_inputs(prefixes.ids, 0, noise_hook, prefixes.positions, prefixes.mask)
    hidden = block_inputs.hidden
    past: list[LayerKV | None] = []
    for layer in range(model.num_layers):
        hidden, layer_past = blocks.run(block_inputs, layer, hidden, None)
        past.append(layer_past)
    return past


def _is_additive(
    blocks: BlockRunner,
    block_inputs: BlockInputs,
    layer: int,
    block_input: Tensor,
    hidden: Tensor,
    past: LayerKV | None,
) -> bool:
    """Whether a change of the down-projection's output is added unchanged to the block's output. It is not when a
    norm follows."""
    probe = hidden[:, 0].detach().roll(1, -1)

    def add(output: Tensor) -> Tensor:
        output.view(*hidden.shape[:2], -1)[:, 0] += probe.to(output.device)
        return output

    with replace_output(blocks.model.down_proj(layer), add):
        probed, _ = blocks.run(block_inputs, layer, block_input, past)
    return torch.allclose(probed[:, 0], hidden[:, 0] + probe, rtol=1e-2, atol=1e-2 * float(probe.abs().max()))
