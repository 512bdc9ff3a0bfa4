"""Estimates of memory, weighed against what is held: service.models.memory_estimates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.peak import peak_bytes
from service.covariance.collect import rows_of, statistics_steps
from service.covariance.corpus import Corpus
from service.editing.methods.registry import find_steps
from service.editing.value_optimizer import rows
from service.engine.decoding import Batch, row
from service.errors import InvalidInput, Unavailable
from service.kit.steps import finish
from service.kit.text import fill
from service.models import memory_estimates
from service.models.hooks import stop_after
from service.models.loading import LoadedModel, load
from service.models.token_batch import forward, pad
from service.recipes.recipe import RomeParameters
from service.schemas import GenerateRequest
from service.tracing.fast_trace import trace_steps
from service.tracing.interventions import Track, cells_of
from service.tracing.reference import KINDS
from service.tracing.trace_input import ask
from service.weights.composition import Association, compose_layer, rebuild
from tests.support.tiny_models import TEXTS, tiny

CPU = torch.device("cpu")
STATEMENT = fill("{} is located in the city of", "The Eiffel Tower")
CONTEXTS = ["Big Ben can be found", "It rises in Japan", "The mother tongue"]


@pytest.fixture(scope="module", params=["gpt2", "gptj", "gpt_neox", "llama", "qwen3", "narrow", "shipped"])
def model(request: pytest.FixtureRequest, shipped: Path) -> LoadedModel:
    if request.param == "shipped":
        return load(str(shipped))
    if request.param == "narrow":  # whose MLP is no wider than its residual
        return tiny("gpt2", layers=3, width=64, inner=64, positions=128)
    return tiny(request.param, layers=4, width=32, inner=128, positions=128)


def bounds(estimate: int, held: int, factor: float = 2.5) -> None:
    assert held <= estimate <= factor * held


@pytest.mark.parametrize(("size", "length"), [(1, 100), (8, 12)])
def test_a_pass(model: LoadedModel, size: int, length: int) -> None:
    """A pass through the blocks holds no more than estimated, and not much less."""
    batch = pad([[1] * (length - i % 2) for i in range(size)], model)

    def work() -> None:
        with stop_after(model.block(model.layers - 1)):
            forward(model, batch)

    bounds(memory_estimates.pass_bytes(model, size, length), peak_bytes(work))


def test_measuring(model: LoadedModel) -> None:
    """With the logits of every position and their log-softmax."""
    batch = pad([[1] * 20] * 16, model)

    def work() -> None:
        with torch.no_grad():
            forward(model, batch).float().log_softmax(-1)

    held = peak_bytes(work)
    assert held <= memory_estimates.measure_bytes(model, 16, 20)


def test_generating(model: LoadedModel) -> None:
    """Rows that are read and then say tokens: the cache, what reads the prompt, and the logits of one position."""
    texts = [TEXTS[0], TEXTS[1], TEXTS[2]] * 2
    asked = GenerateRequest(prompts=texts, max_new_tokens=8, temperature=0.7, seed=1)
    some = [row(model, text, asked) for text in texts]
    length = max(len(r.prompt) for r in some)

    def work() -> Batch:
        batch = Batch(model, some)
        for _ in range(8):
            batch.step()
        return batch

    vocabulary = memory_estimates.Sizes.of(model).V
    estimate = (
        memory_estimates.cache_bytes(model, len(some), length + 8)
        + memory_estimates.pass_bytes(model, len(some), length)
        + 40 * len(some) * vocabulary
    )
    bounds(estimate, peak_bytes(work))


def test_the_cache_of_a_token() -> None:
    """Keys and values of all layers, with fewer heads where the model has fewer."""
    assert memory_estimates.token_bytes(tiny("gpt2", layers=3, width=16)) == 2 * 3 * 16 * 4
    assert memory_estimates.token_bytes(tiny("llama", layers=3, width=16)) == 2 * 3 * 8 * 4
    assert (
        memory_estimates.token_bytes(tiny("gpt2", layers=3, width=16, dtype=torch.bfloat16)) == 2 * 3 * 16 * 2
    )


@pytest.mark.parametrize(
    ("layer", "target"), [(2, "Rome"), (0, "Rome in Italy, and nowhere else in the world")]
)
def test_an_edit(model: LoadedModel, layer: int, target: str) -> None:
    """The search for an edit's value, from its texts to its association."""
    parameters = RomeParameters(layers=[layer], steps=4)
    statistics = finish(statistics_steps(model, [layer], Corpus("test", tuple(TEXTS)), None))
    found = rows(model, STATEMENT, target, CONTEXTS)
    texts = found.texts()
    before = max(t.last_subject for t in texts)
    active = max(len(t.ids) - t.last_subject for t in texts)
    said = sum(map(len, found.targets)) + 1
    held = peak_bytes(lambda: finish(find_steps(model, statistics, CONTEXTS, STATEMENT, target, parameters)))
    bounds(memory_estimates.edit_bytes(model, len(texts), before, active, layer, said), held)


def test_a_trace(model: LoadedModel) -> None:
    """A causal trace of all kinds, severed paths included."""
    statement, samples = fill("{} is in", "Japan"), 3
    length = len(model.encode(statement.text)[0])
    q = ask(model, statement, None, samples, 0.5, 1, None, ())
    tracks: dict[int, set[Track]] = {}
    for cell in cells_of(q, KINDS, 10, True, model.layers):
        if not cell.is_low(q, model.layers):
            mine = {cell.track(sample, q, model.layers) for sample in range(samples)}
            tracks[cell.token] = tracks.get(cell.token, set()) | mine
    counts = {token: len(some) for token, some in tracks.items()}
    held = peak_bytes(lambda: finish(trace_steps(model, statement, samples=samples, noise=0.5, severed=True)))
    bounds(memory_estimates.trace_bytes(model, length, samples, counts), held)
    assert memory_estimates.trace_bytes(model, length, samples) >= memory_estimates.trace_bytes(
        model, length, samples, counts
    )


@pytest.mark.parametrize("layers", [[0], [0, 2]])
def test_statistics(model: LoadedModel, layers: list[int]) -> None:
    """Collecting and factoring, for one layer and for several."""
    corpus = Corpus("test", tuple(TEXTS * 20))
    longest = max(map(len, rows_of(model, corpus)))
    held = peak_bytes(lambda: finish(statistics_steps(model, layers, corpus, None)))
    bounds(memory_estimates.statistics_bytes(model, len(layers), longest), held)


@pytest.mark.parametrize("edits", [1, 40, 600])
def test_composing(model: LoadedModel, edits: int) -> None:
    """A layer's weight for few edits and for many; what is kept of it in the end is the weight alone."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(edits, model.inner_width, generator=g)
    some = [Association(f"{i:04}", f"s{i}", 0, k, k, torch.randn(model.width)) for i, k in enumerate(keys)]
    base, conv1d = model.weight(0).data, model.architecture.conv1d
    bounds(
        memory_estimates.compose_bytes(model, edits),
        peak_bytes(lambda: rebuild(base, compose_layer(some), conv1d)),
    )
    assert memory_estimates.version_bytes(model, 2) == 2 * base.numel() * base.element_size()


def test_what_fits_is_admitted() -> None:
    """Work that there is room for passes without a word."""
    memory_estimates.admit("this", 1, CPU, "ask for less")


def test_what_could_never_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the device has is an error of the request, which says what to change."""
    monkeypatch.setattr(memory_estimates, "room", lambda _: 2**30)
    monkeypatch.setattr(memory_estimates, "capacity", lambda _: 4 * 2**30)
    with pytest.raises(
        InvalidInput, match=r"the trace would take 5\.0 GiB of memory, and the worker has 4\.0: use less"
    ) as refused:
        memory_estimates.admit("the trace", 5 * 2**30, CPU, "use less", "samples")
    assert refused.value.field == "samples"


def test_what_may_fit_later_is_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than is free now, but not more than the device has, may be asked for again."""
    monkeypatch.setattr(memory_estimates, "room", lambda _: 2**30)
    monkeypatch.setattr(memory_estimates, "capacity", lambda _: 4 * 2**30)
    with pytest.raises(Unavailable, match=r"of which 1\.0 are free now: ask again later, or use less"):
        memory_estimates.admit("the trace", 3 * 2**30, CPU, "use less")


def test_where_nobody_knows_all_is_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that tells nothing of its memory refuses nothing."""
    assert memory_estimates.room(torch.device("mps")) is None
    monkeypatch.setattr(memory_estimates, "room", lambda _: None)
    memory_estimates.admit("this", 2**60, CPU, "ask for less")


def machine(root: Path, files: dict[str, str]) -> Path:
    """A machine that tells this of its memory."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = "MemTotal:  8192 kB\nMemFree: 1 kB\nMemAvailable:   4096 kB\nHugePages: 0\n"


def test_the_host_says_what_is_free(tmp_path: Path) -> None:
    """Without a control group, what the kernel calls available counts."""
    root = machine(tmp_path, {"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "max\n"})
    assert memory_estimates.room(CPU, root) == 4096 * 1024
    assert memory_estimates.capacity(CPU, root) == 8192 * 1024


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
def test_a_container_has_no_more_than_its_limit(
    tmp_path: Path, folder: str, names: tuple[str, str], file: str
) -> None:
    """Below a control group's limit counts what it does not use, cached files not counted, in both of their versions."""
    files = {
        "proc/meminfo": MEMINFO,
        f"{folder}/{names[0]}": "3000000\n",
        f"{folder}/{names[1]}": "2500000\n",
        f"{folder}/memory.stat": f"anon 5\n{file} 100000\n",
    }
    root = machine(tmp_path, files)
    assert memory_estimates.room(CPU, root) == 600000
    assert memory_estimates.capacity(CPU, root) == 3000000


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    """No such files: nobody knows."""
    assert memory_estimates.room(CPU, tmp_path) is None and memory_estimates.capacity(CPU, tmp_path) is None
