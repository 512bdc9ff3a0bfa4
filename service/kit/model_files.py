"""Where the files of a model lie: in its folder, or beside its GGUF file. Torch-free."""

from __future__ import annotations

from pathlib import Path

from service.errors import Misconfigured

CONFIG_FILE = "config.json"
GGUF_SUFFIX = ".gguf"


def is_gguf(model: str | Path) -> bool:
    """Return whether a model is given as a GGUF file."""
    return str(model).lower().endswith(GGUF_SUFFIX)


def companion_file(model: Path, name: str) -> Path:
    """Return the path of a file that belongs to a model: `NAME` in its folder, or `STEM.NAME` beside `STEM.gguf`,
    because one folder may hold the GGUF files of many models."""
    return model.with_name(f"{model.stem}.{name}") if is_gguf(model) else model / name


def local_model(path: Path) -> Path:
    """Return the folder or the GGUF file that a path names. A folder without config.json stands for the one GGUF file
    in it; Misconfigured where it has several."""
    if not path.is_dir() or (path / CONFIG_FILE).exists():
        return path
    files = sorted(file for file in path.iterdir() if is_gguf(file))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise Misconfigured(f"the folder {str(path)!r} has several GGUF files ({names}): name one of them.")
    return files[0] if files else path
