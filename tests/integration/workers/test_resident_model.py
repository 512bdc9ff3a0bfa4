"""Loading the model that a process serves: workers.resident_model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from service.errors import Misconfigured
from service.models import placement
from service.settings import SHIPPED_MODEL, Settings
from tests.support.fake_devices import CPU, MAIN, SECOND, FakeDevices
from workers.resident_model import load_without_bos


def test_device_map_spreads_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `device_map` the blocks are on the planned devices, and the fingerprint is that of the model on one."""
    count = load_without_bos(Settings(data_dir=tmp_path)).num_layers
    devices = [MAIN] * (count - 2) + [SECOND, CPU]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(placement, "plan_devices", lambda *_: devices)
    monkeypatch.setattr(placement, "MAIN_DEVICE", MAIN)
    with FakeDevices():
        model = load_without_bos(Settings(data_dir=tmp_path, device_map="auto"))
        assert model.block_devices == devices and model.device == MAIN
    assert model.fingerprint == load_without_bos(Settings(data_dir=tmp_path)).fingerprint


def test_device_and_device_map_exclude_each_other() -> None:
    """Both together are refused, and the message says so."""
    settings = Settings(model=str(SHIPPED_MODEL), device="cpu", device_map="auto")
    with pytest.raises(Misconfigured, match="--device and --device-map exclude each other"):
        load_without_bos(settings)
