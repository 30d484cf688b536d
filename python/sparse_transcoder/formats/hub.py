"""Checkpoints on the Hugging Face hub: org/name, or hf://org/name[/folder][@revision].

circuit-tracer writes ?revision= for @, which is read too.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ADDRESS = re.compile(rf"hf://({NAME.pattern})((?:/[^@?/]+)*)/?(?:(?:@|\?revision=)([^@?]+))?")
READ = ("*.safetensors", "*.npz", "*.pt", "*.pth", "*.json", "*.yaml")


def local_folder(name: str) -> Path:
    """The folder that a path or a hub name stands for; what is not here yet is downloaded.

    A relative path that is there is taken before a hub name. Without a connection the files in the
    download cache are used.

    Raises:
        ValueError: the address is malformed.
        ImportError: huggingface_hub is not installed.
        FileNotFoundError: the hub has no such repository, revision or folder, or cannot be reached.
    """
    address = ADDRESS.fullmatch(name)
    if name.startswith("hf://") and (address is None or ".." in address[2].split("/")):
        raise ValueError(f"{name}: must be hf://org/name[/folder][@revision]")
    if address is None and (Path(name).exists() or not NAME.fullmatch(name)):
        return Path(name)
    repository, inside, revision = address.groups() if address else (name, "", None)
    folder = (inside or "").strip("/")
    patterns = [f"{folder}/{one}" if folder else one for one in READ]
    return _snapshot(name, repository, revision, patterns) / folder


def local_file(name: str) -> Path:
    """The file that hf://org/name/file[@revision] stands for, and the configs beside it.

    Errors are those of :func:`local_folder`.
    """
    address = ADDRESS.fullmatch(name)
    if address is None or not address[2] or ".." in address[2].split("/"):
        raise ValueError(f"{name}: must be hf://org/name/file[@revision]")
    repository, inside, revision = address.groups()
    file = PurePosixPath(inside.strip("/"))
    configs = str(file.parent / "*.json")
    found = _snapshot(name, repository, revision, [str(file), configs]) / file
    if not found.is_file():
        raise FileNotFoundError(f"{name}: the hub, or its cache here, has no such file")
    return found


def _snapshot(name: str, repository: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{name}: there is no such folder, and huggingface_hub is needed for names of the hub: "
            "pip install sparse_transcoder[hub]"
        ) from None
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # Of the network, the hub or the cache, of many libraries.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise FileNotFoundError(
            f"{name}: there is no such folder, nor can it be had from the hub: {reason}"
        ) from None
