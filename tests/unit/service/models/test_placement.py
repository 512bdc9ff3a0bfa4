"""The plan of the blocks of a model on several devices: service.models.placement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from service.errors import Misconfigured
from service.models import memory_estimates
from service.models.placement import devices_of_blocks, moved, place_blocks, plan_devices, spread
from tests.support.fake_devices import CPU, MAIN, SECOND, FakeDevices
from tests.support.tiny_models import tiny
from workers.model_info import device_kind

GPU = [torch.device("cuda", i) for i in range(3)]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[Any, float]], None]:
    """Return a function that sets the free memory of the devices, in blocks of the tiny model."""

    def set_memory(blocks: dict[Any, float]) -> None:
        size = sum(p.nbytes for p in tiny(layers=1).block(0).parameters())
        free = {
            device: int(number * size / (1 if device == "cpu" else 0.85)) for device, number in blocks.items()
        }
        monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: dict(free))

    return set_memory


def test_blocks_fill_the_gpus_in_order(memory: Callable[[dict[Any, float]], None]) -> None:
    """Consecutive blocks are on one device, none is split, and what does not fit onto the GPUs is on the CPU."""
    memory({0: 9, 1: 3.5, "cpu": 100})
    model = tiny(layers=8)
    devices = plan_devices(model.model, model.architecture)
    assert len(devices) == 8 and devices == sorted(devices, key=[*GPU, CPU].index)
    assert devices.count(GPU[1]) == 3
    assert devices[-1] in (GPU[1], CPU)


def test_model_that_fits_nowhere_is_refused(memory: Callable[[dict[Any, float]], None]) -> None:
    """If a block fits onto no device and not into the memory, the message says what to do."""
    memory({0: 2.5, "cpu": 2.5})
    model = tiny(layers=8)
    with pytest.raises(Misconfigured, match="fits neither onto a GPU nor into the memory"):
        plan_devices(model.model, model.architecture)


def test_devices_are_read_from_the_map_of_blocks() -> None:
    """A map names each block, or all of them at once."""
    assert devices_of_blocks({"0": 0, "1": 1, "2": "cpu"}, 3) == [GPU[0], GPU[1], CPU]
    assert devices_of_blocks({"": 0}, 2) == [GPU[0], GPU[0]]


def test_without_a_gpu_the_model_stays_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` on a machine without GPUs is the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    model = tiny()
    spread(model.model, model.architecture)
    assert model.block_devices == [CPU] * 3 and not model.block(2)._forward_pre_hooks


def test_tensors_of_arguments_move_and_caches_stay() -> None:
    """Tensors are moved also within tuples and lists; other values are passed on."""
    with FakeDevices():
        cache = object()
        first, (second, none), kept = moved((torch.ones(1), [torch.ones(1), None], cache), MAIN)
        assert first.device == second.device == MAIN
        assert none is None and kept is cache


def test_kind_of_device_names_the_blocks_of_each() -> None:
    """Replicas are of one kind if their blocks are on devices of the same kinds in the same order."""
    with FakeDevices():
        model = tiny()
        assert device_kind(model) == "cpu"
        place_blocks(model.model, model.architecture, MAIN, [MAIN, SECOND, CPU])
        assert device_kind(model) == "xpu x 2, cpu x 1"


def test_memory_for_all_blocks_is_that_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What every block has a part of is limited by the device with the least free memory for each of its blocks."""
    free = {MAIN: 900, SECOND: 200, CPU: None}
    monkeypatch.setattr(memory_estimates, "free_bytes", lambda device: free[device])
    with FakeDevices():
        model = tiny()
        place_blocks(model.model, model.architecture, MAIN, [MAIN, MAIN, SECOND])
        assert memory_estimates.free_bytes_for_blocks(model) == 600
        model = tiny()
        place_blocks(model.model, model.architecture, MAIN, [MAIN, MAIN, CPU])
        assert memory_estimates.free_bytes_for_blocks(model) is None
