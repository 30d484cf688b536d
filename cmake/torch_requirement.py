"""Build metadata: the wheel requires the torch minor version that it was compiled against."""

import importlib.metadata


def dynamic_metadata(field, settings=None):
    assert field == "dependencies"
    major, minor = importlib.metadata.version("torch").split(".")[:2]
    return [f"torch=={major}.{minor}.*"]
