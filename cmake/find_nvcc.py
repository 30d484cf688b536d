"""find_nvcc.py MAJOR prints an nvcc of that major version of CUDA, or fails where none is found."""

import glob
import os
import shutil
import subprocess
import sys
import sysconfig


def candidates(major):
    yield os.environ.get("CUDACXX")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        yield os.path.join(os.environ.get(name, ""), "bin", "nvcc")
    yield shutil.which("nvcc")
    yield from sorted(glob.glob("/usr/local/cuda*/bin/nvcc"))
    # The packages of NVIDIA's that pip installs.
    yield os.path.join(sysconfig.get_path("purelib"), "nvidia", f"cu{major}", "bin", "nvcc")


def find(major):
    for path in candidates(major):
        if path and os.access(path, os.X_OK):
            done = subprocess.run([path, "--version"], capture_output=True, text=True)
            if f"release {major}." in done.stdout:
                return path
    return None


if __name__ == "__main__":
    found = find(sys.argv[1])
    sys.exit(print(found) if found else 1)
