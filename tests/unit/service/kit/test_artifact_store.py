"""What a long computation keeps: service.kit.artifact_store."""

from __future__ import annotations

from pathlib import Path

from service.kit.artifact_store import Folder, get_json, put_json


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    """By its name, and by whoever opens the folder next; nothing else lies there."""
    kept = Folder(tmp_path / "runs")
    assert kept.get("a.json") is None and get_json(kept, "a.json") is None
    put_json(kept, "a.json", {"π": [1.5, None]})
    put_json(kept, "a.json", {"π": [2.5, None]})
    assert get_json(Folder(tmp_path / "runs"), "a.json") == {"π": [2.5, None]}
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["a.json"]
