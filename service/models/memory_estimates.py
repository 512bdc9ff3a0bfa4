"""Peak memory of each kind of work, in bytes beyond the resident weights, and admission by free memory.

The estimates are upper bounds within a small factor of the measured peak
(tests/integration/models/test_memory_estimates.py). They count live tensors between operations. d: hidden size; D:
inner width; a: width of all query heads together; kv: width of all key heads; V: vocabulary; L: layers; s: bytes of a
number. No work copies the model: an edit keeps activations, and a version keeps its edited weights only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from service.errors import InvalidInput, Unavailable
from service.models.budget import block_flops, step_budget
from service.models.loading import LoadedModel

GIB = 2**30
# Padded tokens in one forward pass that collects statistics: such a step is shorter than an optimization step.
STATISTICS_BATCH_TOKENS = 256
COLUMN_BLOCK = 512  # columns of a weight that are converted to fp64 at a time


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that the estimates use."""

    d: int
    D: int
    a: int
    kv: int
    V: int
    heads: int
    s: int  #: bytes of a number
    eager: bool  #: the attention materializes its weights
    parallel: bool  #: attention and MLP read the same input
    masks: int  #: masks of a batch: one for each kind of layer
    inner: int  #: tensors of the inner width that an MLP holds together

    @classmethod
    def of(cls, model: LoadedModel) -> ModelSizes:
        config, weight = model.model.config, model.weight(0)
        heads = int(config.num_attention_heads)
        size = int(getattr(config, "head_dim", None) or model.hidden_size // heads)
        keys = model.architecture.key_heads(config)
        vocabulary = model.lm_head.weight.shape[0]  # type: ignore[index]
        eager = config._attn_implementation == "eager" or model.architecture.holds_weights
        return cls(
            model.hidden_size,
            model.intermediate_size,
            heads * size,
            keys * size,
            int(vocabulary),
            heads,
            weight.element_size(),
            eager,
            model.architecture.parallel,
            len(set(getattr(config, "layer_types", None) or [""])),
            4 if model.architecture.fused_gate else 3,
        )


def kv_bytes_per_token(model: LoadedModel) -> int:
    """Return the bytes of keys and values of one token in all layers: 2 kv L s."""
    n = ModelSizes.of(model)
    return 2 * n.kv * model.num_layers * n.s


def kv_cache_bytes(model: LoadedModel, rows: int, positions: int) -> int:
    """Return the bytes of the KV cache of a decoding batch.

    The cache allocates half as many columns again as are in use (at least 32). Growing copies one layer at a time.
    """
    allocated_positions = positions + max(32, positions // 2)
    return rows * allocated_positions * kv_bytes_per_token(model) * (model.num_layers + 1) // model.num_layers


def forward_bytes(model: LoadedModel, rows: int, positions: int, past: int = 0) -> int:
    """Return the bytes of a forward pass of rows x positions through the blocks, without gradients.

    One block is live at a time. Attention holds the residual, its normed copy, queries, keys, values, its output, and
    transposed copies of these: 4 d + 7 a per token. The MLP holds the residual, its normed copy, its output, and at
    most three tensors of the inner width, four where one projection computes two of them: 6 d + 3 D per token. The two
    are not live together. Half precision is normed in single precision: 3 d of 4 bytes. With `past` earlier positions,
    keys and values are concatenated and repeated for each query head: 2 (kv + a) per position. Rotary tables have twice
    the width of a head per token. A mask for each kind of layer has one number per pair of positions; eager attention
    has four fp32 numbers per head.
    """
    n = ModelSizes.of(model)
    tokens, pairs = rows * positions, rows * positions * (past + positions)
    weights = 16 * n.heads * pairs if n.eager else 0
    attention = n.s * tokens * (4 * n.d + 7 * n.a) + weights
    mlp = n.s * tokens * (6 * n.d + n.inner * n.D)
    norms = 12 * n.d * tokens if n.s < 4 else 0
    past_kv = n.s * rows * (past + positions) * 2 * n.kv if past else 0
    return max(attention, mlp) + norms + past_kv + n.s * (2 * tokens * n.a // n.heads + n.masks * pairs)


def scoring_bytes(model: LoadedModel, rows: int, positions: int) -> int:
    """Return the bytes of a forward pass with the logits of every position, their fp32 copy and their log-softmax."""
    n = ModelSizes.of(model)
    return forward_bytes(model, rows, positions) + rows * positions * n.V * (n.s + 8)


def edit_bytes(
    model: LoadedModel, rows: int, prefix_length: int, suffix_length: int, layer: int, logit_positions: int
) -> int:
    """Return the bytes of the optimization of values at `layer`.

    `rows` texts have `prefix_length` positions before the subject's edited token and `suffix_length` from it on;
    logits are computed at `logit_positions` places. Keys and values of the prefix are kept for all L layers. Above
    the edited layer a step holds them twice more (the active rows, and concatenated with the suffix), and the
    activations that the gradient needs: 5 d + 4 a + 3 D per position, or 4 d + D where MLP and attention are parallel
    (linear maps with frozen weights need none). Eager attention keeps its weights one and a half times in fp32. Added
    are one block's temporaries and, at each of the logit positions, logits, log-softmax and their gradients: at least
    five times V in fp32.
    """
    n = ModelSizes.of(model)
    layers_above = model.num_layers - layer
    prefix_kv = n.s * rows * prefix_length * 2 * n.kv * model.num_layers
    kv_per_layer = n.s * rows * 2 * (2 * prefix_length + suffix_length) * n.kv
    activations_per_layer = (
        n.s * rows * suffix_length * (4 * n.d + n.D if n.parallel else 5 * n.d + 4 * n.a + n.inner * n.D)
    )
    attention_weights = 6 * n.heads * rows * suffix_length * (prefix_length + suffix_length) if n.eager else 0
    blocks = forward_bytes(model, rows, max(suffix_length, prefix_length), min(suffix_length, prefix_length))
    return (
        prefix_kv
        + layers_above * (kv_per_layer + activations_per_layer + attention_weights)
        + blocks
        + 5 * logit_positions * n.V * max(4, n.s)
    )


def trace_bytes(
    model: LoadedModel,
    positions: int,
    samples: int,
    runs_by_token: Mapping[int, int] | None = None,
    answer_length: int = 1,
) -> int:
    """Return the bytes of a causal trace of `positions` tokens, of which the last `answer_length` predict the object.

    The base runs, 1 + R rows, keep every block's output, keys, values and the outputs of both modules: 3 d + 2 kv per
    position and layer. A step advances runs through one block: as many as the step budget allows, and at most
    `runs_by_token` (by default 5 L R: one for each layer, kind and severed path). It holds three states, the keys and
    values of earlier positions, and one block's temporaries.
    """
    n = ModelSizes.of(model)
    base_runs = n.s * (1 + samples) * positions * ((3 * n.d + 2 * n.kv) * model.num_layers + n.d)
    budget = step_budget(model) // block_flops(model)
    counts = (
        dict.fromkeys(range(positions), 5 * model.num_layers * samples)
        if runs_by_token is None
        else runs_by_token
    )

    def step(token: int) -> int:
        here = positions - token
        rows = min(counts[token], max(1, budget // here))
        states = n.s * rows * (3 * here * n.d + 2 * token * n.kv + answer_length * n.d)
        return states + forward_bytes(model, rows, here, token)

    runs = forward_bytes(model, min(1 + samples, max(1, budget // positions)), positions)
    head = 2 * model.lm_head.weight.numel() * answer_length  # type: ignore[operator]
    head_rows = min(max(counts.values()), max(1, step_budget(model) // head)) * answer_length
    steps = max(map(step, counts))
    return base_runs + max(runs, steps, head_rows * n.V * (n.s + 16))


def statistics_bytes(model: LoadedModel, layers: int, longest: int) -> int:
    """Return the bytes of collecting and factoring C of some layers.

    D^2 in fp64 twice per layer and once more, and one forward pass over STATISTICS_BATCH_TOKENS in rows of at most
    `longest`.
    """
    n = ModelSizes.of(model)
    length = min(STATISTICS_BATCH_TOKENS, model.max_positions, longest)
    forward = forward_bytes(
        model, STATISTICS_BATCH_TOKENS // length, length
    ) + STATISTICS_BATCH_TOKENS * n.D * (layers * n.s + 8)
    return (2 * layers + 1) * n.D**2 * 8 + forward


def version_bytes(model: LoadedModel, layers: int) -> int:
    """Return the bytes of the edited weights of one version: d D s per layer."""
    n = ModelSizes.of(model)
    return layers * n.d * n.D * n.s


def compose_bytes(model: LoadedModel, edits: int) -> int:
    """Return the bytes of composing one layer of a version with n edits.

    Keys and directions in fp32, 8 n D; in fp64 three times the values, 24 n d, the gram matrix and its factors, 24 n^2,
    and COLUMN_BLOCK columns of everything at a time.
    """
    n = ModelSizes.of(model)
    columns = 8 * min(COLUMN_BLOCK, n.D) * (2 * edits + 2 * n.d)
    return 8 * edits * n.D + 24 * edits * (n.d + edits) + columns + version_bytes(model, 1)


def require_memory(description: str, needed: int, device: torch.device, advice: str, field: str = "") -> None:
    """Raise if work needs more bytes than are free. `advice` says what the user can reduce.

    InvalidInput: the work exceeds the total memory of the device. Unavailable: it exceeds the free memory only.
    """
    free, total = free_bytes(device), total_bytes(device)
    if free is None or needed <= free:
        return
    message = f"{description} would take {needed / GIB:.1f} GiB of memory"
    if total is not None and needed > total:
        raise InvalidInput(f"{message}, and the worker has {total / GIB:.1f}: {advice}.", field)
    raise Unavailable(f"{message}, of which {free / GIB:.1f} are free now: ask again later, or {advice}.")


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Return the free bytes of a device for this process; None where they are unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + idle)
    return (
        _min_known(_meminfo_bytes(root, "MemAvailable"), _cgroup_memory(root)[1])
        if device.type == "cpu"
        else None
    )


def free_bytes_for_blocks(model: LoadedModel) -> int | None:
    """Return the free bytes for what every block has an equal part of on its device, such as keys and values; None
    where they are unknown."""
    sizes: list[int] = []
    for device, blocks in Counter(model.block_devices).items():
        free = free_bytes(device)
        if free is None:
            return None
        sizes.append(free * model.num_layers // blocks)
    return min(sizes)


def total_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Return the total bytes of a device; None where they are unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return (
        _min_known(_meminfo_bytes(root, "MemTotal"), _cgroup_memory(root)[0])
        if device.type == "cpu"
        else None
    )


def _min_known(*sizes: int | None) -> int | None:
    return min((x for x in sizes if x is not None), default=None)


def _meminfo_bytes(root: Path, name: str) -> int | None:
    """Return a line of /proc/meminfo, in bytes."""
    return _read_counters(root / "proc/meminfo").get(f"{name}:", 0) * 1024 or None


def _cgroup_memory(root: Path) -> tuple[int | None, int | None]:
    """Return the control group's limit and the bytes left below it; cached files count as free."""
    for folder, limit, used, files in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        cgroup = root / folder
        limit_bytes, used_bytes = _read_int(cgroup / limit), _read_int(cgroup / used)
        if limit_bytes is not None and used_bytes is not None:
            return limit_bytes, max(
                0, limit_bytes - used_bytes + _read_counters(cgroup / "memory.stat").get(files, 0)
            )
    return None, None


def _read_int(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max" is no limit
        return None


def _read_counters(file: Path) -> dict[str, int]:
    """A file of names and numbers."""
    try:
        words = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeError):
        return {}
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}
