"""Build metadata: the wheel works with the torch minor version it was compiled against, and requires it."""

import importlib.metadata


def dynamic_metadata(field, settings=None):
    assert field == "dependencies"
    major, minor = importlib.metadata.version("torch").split(".")[:2]
    return [f"torch=={major}.{minor}.*"]
