"""What a long computation keeps: service.kit.artifact_store."""

from __future__ import annotations

from pathlib import Path

from service.kit.artifact_store import DirectoryStore, get_json, put_json


def test_stored_value_is_read_back(tmp_path: Path) -> None:
    """By its name, and by whoever opens the folder next; nothing else lies there."""
    store = DirectoryStore(tmp_path / "runs")
    assert store.get("a.json") is None and get_json(store, "a.json") is None
    put_json(store, "a.json", {"π": [1.5, None]})
    put_json(store, "a.json", {"π": [2.5, None]})
    assert get_json(DirectoryStore(tmp_path / "runs"), "a.json") == {"π": [2.5, None]}
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["a.json"]
