"""Prints the type stub of the compiled module, as it is committed.

python -m tests.stub > python/sparse_transcoder/_C.pyi
"""

import subprocess
import sys
import tempfile
from pathlib import Path


def generate() -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "pybind11_stubgen", "sparse_transcoder._C", "-o", folder]
        subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=folder)
        lines = (Path(folder) / "sparse_transcoder" / "_C.pyi").read_text().splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


if __name__ == "__main__":
    print(generate(), end="")
