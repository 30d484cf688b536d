"""Finds the torch of the environment: what is built against, and what the wheel requires.

pip's build isolation hides the environment's packages from imports and leaves them where they are.
As a program it prints the folder of torch, or an empty line.
"""

import importlib.util
import re
import sysconfig
from pathlib import Path


def folder():
    """The folder of the torch that can be imported, else of a hidden one, else None."""
    spec = importlib.util.find_spec("torch")
    found = Path(spec.origin).parent if spec else Path(sysconfig.get_path("purelib"), "torch")
    return found if found.is_dir() else None


def requirement(first, last):
    """What a build for these minor versions of torch, and for all between them, requires."""
    major, minor = last.split(".")[:2]
    return f"torch>={'.'.join(first.split('.')[:2])},<{major}.{int(minor) + 1}"


def get_requires_for_dynamic_metadata(settings):
    """Where there is no torch, the build fetches the newest that is supported."""
    return [] if folder() else [requirement(settings["torch"][0], settings["torch"][-1])]


def dynamic_metadata(settings, project):
    text = (folder() / "version.py").read_text()
    version = re.search(r"^__version__ = '([^']+)", text, re.MULTILINE)[1]
    return {"dependencies": [requirement(version, version)]}


def dynamic_wheel(settings):
    """What a wheel requires is not known before it is built."""
    return {"dependencies": True}


if __name__ == "__main__":
    print(folder() or "")
