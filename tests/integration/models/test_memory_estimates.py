"""Tests of service.models.memory_estimates against the measured peak."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.peak_memory import peak_bytes
from service.covariance.collect import load_or_collect_statistics, tokenize_corpus
from service.covariance.corpus import Corpus
from service.editing.edit_spec import build_edit_spec
from service.editing.find_factors import find_factors
from service.editing.tokenized_contexts import tokenize_contexts
from service.engine.decoding import DecodingBatch, new_sequence
from service.errors import InvalidInput, Unavailable
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt
from service.methods.parameters import GraceParameters, RomeParameters
from service.models import memory_estimates
from service.models.hooks import stop_after
from service.models.loading import LoadedModel, load_model
from service.models.token_batch import forward, pad
from service.schemas import GenerateRequest
from service.tracing.fast_trace import trace_statement
from service.tracing.interventions import CorruptedRun, list_cells
from service.tracing.reference import TRACE_KINDS
from service.tracing.trace_input import build_trace_input
from service.weights.composition import apply_delta, compose_layer
from service.weights.factors import Association
from tests.support.tiny_models import TEXTS, tiny

CPU = torch.device("cpu")
STATEMENT = fill_prompt("{} is located in the city of", "The Eiffel Tower")
CONTEXTS = ["Big Ben can be found", "It rises in Japan", "The mother tongue"]


@pytest.fixture(scope="module", params=["gpt2", "gptj", "gpt_neox", "llama", "qwen3", "narrow", "shipped"])
def model(request: pytest.FixtureRequest, shipped: Path) -> LoadedModel:
    if request.param == "shipped":
        return load_model(str(shipped))
    if request.param == "narrow":  # whose MLP is no wider than its residual
        return tiny("gpt2", layers=3, width=64, inner=64, positions=128)
    return tiny(request.param, layers=4, width=32, inner=128, positions=128)


def assert_bounds(estimate: int, held: int, factor: float = 2.5) -> None:
    assert held <= estimate <= factor * held


@pytest.mark.parametrize(("size", "length"), [(1, 100), (8, 12)])
def test_forward_bytes(model: LoadedModel, size: int, length: int) -> None:
    """The estimate of a forward pass is an upper bound within a small factor of the peak."""
    batch = pad([[1] * (length - i % 2) for i in range(size)], model)

    def work() -> None:
        with stop_after(model.block(model.num_layers - 1)):
            forward(model, batch)

    assert_bounds(memory_estimates.forward_bytes(model, size, length), peak_bytes(work))


def test_scoring_bytes(model: LoadedModel) -> None:
    """The estimate of scoring includes the logits of every position and their log-softmax."""
    batch = pad([[1] * 20] * 16, model)

    def work() -> None:
        with torch.no_grad():
            forward(model, batch).float().log_softmax(-1)

    held = peak_bytes(work)
    assert held <= memory_estimates.scoring_bytes(model, 16, 20)


def test_generation_bytes(model: LoadedModel) -> None:
    """The estimate of generation includes the KV cache, the prefill and the logits of one position."""
    texts = [TEXTS[0], TEXTS[1], TEXTS[2]] * 2
    request = GenerateRequest(prompts=texts, max_new_tokens=8, temperature=0.7, seed=1)
    sequences = [new_sequence(model, text, request) for text in texts]
    length = max(len(r.prompt_ids) for r in sequences)

    def work() -> DecodingBatch:
        batch = DecodingBatch(model, sequences)
        for _ in range(8):
            batch.step()
        return batch

    vocabulary = memory_estimates.ModelSizes.of(model).V
    estimate = (
        memory_estimates.kv_cache_bytes(model, len(sequences), length + 8)
        + memory_estimates.forward_bytes(model, len(sequences), length)
        + 40 * len(sequences) * vocabulary
    )
    assert_bounds(estimate, peak_bytes(work))


def test_kv_bytes_per_token() -> None:
    """The KV cache estimate uses the number of key heads of each architecture."""
    assert memory_estimates.kv_bytes_per_token(tiny("gpt2", layers=3, width=16)) == 2 * 3 * 16 * 4
    assert memory_estimates.kv_bytes_per_token(tiny("llama", layers=3, width=16)) == 2 * 3 * 8 * 4
    assert (
        memory_estimates.kv_bytes_per_token(tiny("gpt2", layers=3, width=16, dtype=torch.bfloat16))
        == 2 * 3 * 16 * 2
    )


@pytest.mark.parametrize(
    ("layer", "target"), [(2, "Rome"), (0, "Rome in Italy, and nowhere else in the world")]
)
def test_edit_bytes(model: LoadedModel, layer: int, target: str) -> None:
    """The estimate of the value optimization is an upper bound from tokenization to the association."""
    parameters = RomeParameters(layers=[layer], steps=4)
    statistics = run_to_completion(
        load_or_collect_statistics(model, [layer], Corpus("test", tuple(TEXTS)), None)
    )
    contexts = tokenize_contexts(model, STATEMENT, target, CONTEXTS)
    texts = contexts.texts()
    prefix_length = max(t.last_subject_index for t in texts)
    suffix_length = max(len(t.ids) - t.last_subject_index for t in texts)
    logit_positions = sum(map(len, contexts.targets)) + 1
    held = peak_bytes(
        lambda: run_to_completion(find_factors(model, statistics, CONTEXTS, STATEMENT, target, parameters))
    )
    assert_bounds(
        memory_estimates.edit_bytes(model, len(texts), prefix_length, suffix_length, layer, logit_positions),
        held,
    )


def test_codebook_entry_bytes(model: LoadedModel) -> None:
    """The estimate of the search for an entry of a codebook is an upper bound."""
    parameters = GraceParameters(layers=(0,), steps=4)
    target = "Rome in Italy, and nowhere else in the world"
    spec = build_edit_spec(model, (), STATEMENT, target, parameters, method="grace")
    steps = find_factors(model, {}, (), STATEMENT, target, parameters, method="grace")
    assert_bounds(spec.peak_bytes(model), peak_bytes(lambda: run_to_completion(steps)))


def test_trace_bytes(model: LoadedModel) -> None:
    """The estimate of a causal trace covers all kinds and the severed paths."""
    statement, samples = fill_prompt("{} is in", "Japan"), 3
    length = len(model.encode(statement.text)[0])
    trace_input = build_trace_input(model, statement, None, samples, 0.5, 1, None, ())
    runs_by_token: dict[int, set[CorruptedRun]] = {}
    for cell in list_cells(trace_input, TRACE_KINDS, 10, True, model.num_layers):
        if not cell.is_low(trace_input, model.num_layers):
            mine = {cell.corrupted_run(sample, trace_input, model.num_layers) for sample in range(samples)}
            runs_by_token[cell.token] = runs_by_token.get(cell.token, set()) | mine
    counts = {token: len(some) for token, some in runs_by_token.items()}
    held = peak_bytes(
        lambda: run_to_completion(trace_statement(model, statement, samples=samples, noise=0.5, severed=True))
    )
    assert_bounds(memory_estimates.trace_bytes(model, length, samples, counts), held)
    assert memory_estimates.trace_bytes(model, length, samples) >= memory_estimates.trace_bytes(
        model, length, samples, counts
    )


@pytest.mark.parametrize("layers", [[0], [0, 2]])
def test_statistics_bytes(model: LoadedModel, layers: list[int]) -> None:
    """The estimate of statistics covers collecting and factoring, for one layer and several."""
    corpus = Corpus("test", tuple(TEXTS * 20))
    longest = max(map(len, tokenize_corpus(model, corpus)))
    held = peak_bytes(lambda: run_to_completion(load_or_collect_statistics(model, layers, corpus, None)))
    assert_bounds(memory_estimates.statistics_bytes(model, len(layers), longest), held)


@pytest.mark.parametrize("edits", [1, 40, 600])
def test_compose_bytes(model: LoadedModel, edits: int) -> None:
    """The estimate of composing a layer holds for few and many edits; only the weight is kept."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(edits, model.intermediate_size, generator=g)
    associations = [
        Association(f"{i:04}", f"s{i}", 0, k, k, torch.randn(model.hidden_size)) for i, k in enumerate(keys)
    ]
    base, conv1d = model.weight(0).data, model.architecture.conv1d
    assert_bounds(
        memory_estimates.compose_bytes(model, edits),
        peak_bytes(lambda: apply_delta(base, compose_layer(associations), conv1d)),
    )
    assert memory_estimates.version_bytes(model, 2) == 2 * base.numel() * base.element_size()


def test_work_that_fits_is_accepted() -> None:
    """Work that fits is admitted."""
    memory_estimates.require_memory("this", 1, CPU, "ask for less")


def test_work_that_never_fits_is_invalid_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that exceeds the total memory raises InvalidInput, which says what to change."""
    monkeypatch.setattr(memory_estimates, "free_bytes", lambda _: 2**30)
    monkeypatch.setattr(memory_estimates, "total_bytes", lambda _: 4 * 2**30)
    with pytest.raises(
        InvalidInput, match=r"the trace would take 5\.0 GiB of memory, and the worker has 4\.0: use less"
    ) as refused:
        memory_estimates.require_memory("the trace", 5 * 2**30, CPU, "use less", "samples")
    assert refused.value.field == "samples"


def test_work_that_may_fit_later_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that exceeds only the free memory raises Unavailable."""
    monkeypatch.setattr(memory_estimates, "free_bytes", lambda _: 2**30)
    monkeypatch.setattr(memory_estimates, "total_bytes", lambda _: 4 * 2**30)
    with pytest.raises(Unavailable, match=r"of which 1\.0 are free now: ask again later, or use less"):
        memory_estimates.require_memory("the trace", 3 * 2**30, CPU, "use less")


def test_unknown_memory_accepts_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with unknown memory admits all work."""
    assert memory_estimates.free_bytes(torch.device("mps")) is None
    monkeypatch.setattr(memory_estimates, "free_bytes", lambda _: None)
    memory_estimates.require_memory("this", 2**60, CPU, "ask for less")


def fake_machine(root: Path, files: dict[str, str]) -> Path:
    """Write the memory files of a fake machine."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = "MemTotal:  8192 kB\nMemFree: 1 kB\nMemAvailable:   4096 kB\nHugePages: 0\n"


def test_host_memory_without_a_cgroup_limit(tmp_path: Path) -> None:
    """Without a control group, the kernel's available memory counts."""
    root = fake_machine(tmp_path, {"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "max\n"})
    assert memory_estimates.free_bytes(CPU, root) == 4096 * 1024
    assert memory_estimates.total_bytes(CPU, root) == 8192 * 1024


@pytest.mark.parametrize(
    ("folder", "names", "file"),
    [
        ("sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"),
        (
            "sys/fs/cgroup/memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            "total_inactive_file",
        ),
    ],
)
def test_cgroup_limit_bounds_memory(tmp_path: Path, folder: str, names: tuple[str, str], file: str) -> None:
    """The free memory of a control group is its limit minus its use without cached files, in both cgroup versions."""
    files = {
        "proc/meminfo": MEMINFO,
        f"{folder}/{names[0]}": "3000000\n",
        f"{folder}/{names[1]}": "2500000\n",
        f"{folder}/memory.stat": f"anon 5\n{file} 100000\n",
    }
    root = fake_machine(tmp_path, files)
    assert memory_estimates.free_bytes(CPU, root) == 600000
    assert memory_estimates.total_bytes(CPU, root) == 3000000


def test_memory_is_unknown_without_proc_and_cgroup(tmp_path: Path) -> None:
    """Without these files, the memory is unknown."""
    assert (
        memory_estimates.free_bytes(CPU, tmp_path) is None
        and memory_estimates.total_bytes(CPU, tmp_path) is None
    )
