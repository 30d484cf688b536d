"""tests/cuda_cubin.py SOURCE...: compiles CUDA sources and checks what ptxas says of each kernel.

No kernel may have a stack frame or spill, but for a few bytes in SPILLING; KERNELS has budgets of
registers, and says where loads of 16 bytes are meant. Needs nvcc and c++filt, and no GPU.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_86", "sm_90a", "sm_100", "sm_120")  # those of them that nvcc knows
# As CMake compiles a release.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", f"-I{Path(__file__).resolve().parent.parent / 'csrc'}")

# Kernel; registers, of which a multiprocessor has 65536: 64 leave room for four blocks of 256
# threads, 80 for three, 128 for two; the 16-byte loads from global memory that its PTX has, at
# least.
KERNELS = {
    r"set_layer_pointers_kernel": (32, 0),
    r"prepare_kernel<\w+>": (64, 0),
    r"product_few_rows_kernel<\w+, [12], 1>": (64, 0),
    r"product_few_rows_kernel<\w+, [48], 1>": (80, 0),
    r"product_few_rows_kernel<\w+, [12], [48]>": (64, "all"),
    r"product_few_rows_kernel<\w+, [48], [48]>": (80, "all"),
    r"product_int8_kernel<[12]>": (80, 6),  # of weights and rows; a scale has 4 bytes
    r"product_int8_kernel<4>": (80, 12),
    r"product_int8_kernel<8>": (80, 19),
    r"product_tensor_kernel<float, \d+, \d, 3>": (80, "all"),
    r"product_tensor_kernel<float, \d+, \d, 2>": (128, "all"),
    r"product_tensor_kernel<int, 16, 3, 3>": (80, 15),  # of weights and rows; a scale has 4 bytes
    r"product_tensor_kernel<int, 32, 2, 3>": (80, 12),
    r"product_tensor_kernel<int, 32, 3, 2>": (128, 18),
    r"product_tensor_kernel<int, 64, 3, 2>": (128, 24),
    r"select_kernel<\w+>": (64, 8),  # scores, also ahead, norms and bounds: two accesses each
    r"merge_kernel": (64, 0),
    r"compute_exact_kernel<\w+>": (128, 0),
    r"finish_kernel": (64, 0),
}
# Bytes that may be stored and loaded again. Stored float32 weights are multiplied where there is no
# copy: with screening="off".
SPILLING = {
    (architecture, f"product_few_rows_kernel<float, {rows}, 4>"): 16
    for architecture in ("sm_100", "sm_120")
    for rows in (1, 8)
}


def name_of(declaration):
    """select_kernel<float>, of a declaration with its namespaces and parameters."""
    return re.search(r"(\w+(<[^()]*>)?)(\((?!anonymous)|$)", declaration)[1]


def plain(text):
    """The text with its mangled names as C++ writes them."""
    return subprocess.run("c++filt", input=text, capture_output=True, text=True, check=True).stdout


def read_ptxas(text):
    """{function: [stack, spill stores, spill loads, and of a kernel registers]}, of ptxas -v."""
    found, function = {}, None
    sizes = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    for line in plain(text).splitlines():
        if match := re.search(r"Function properties for (.*)", line):
            function = found[name_of(match[1])] = []
        elif match := re.search(f"{sizes}|Used (\\d+) registers", line):
            function += [int(number) for number in match.groups() if number]
    return found


def read_ptx(text):
    """{kernel: (its 16-byte loads from global memory, all of them)} of PTX."""
    found = {}
    for part in plain(text).split(".entry ")[1:]:
        header, _, body = part.partition("\n")
        loads = re.findall(r"\bld\.global\S*|\bcp\.async\.c[ag]\.shared\.global\S* .*;", body)
        wide = [load for load in loads if re.search(r"v4\.[bfsu]32|v2\.[bfsu]64|, 16\b", load)]
        found[name_of(header)] = (len(wide), len(loads))
    return found


def faults(functions, loads, architecture):
    """One line for each function that is not as it should be."""
    lines = []
    for name in sorted({*functions, *loads}):
        bad = [] if name in functions else ["ptxas says nothing of it"]
        stack, stored, loaded, *registers = functions.get(name, (0, 0, 0))
        wide, total = loads.get(name, (0, 0))
        spill = SPILLING.get((architecture, name), 0)
        if stack > spill:
            bad.append(f"a stack frame of {stack} bytes")
        if max(stored, loaded) > spill:
            bad.append(f"spills: {stored} bytes stored and {loaded} loaded")
        for used in registers:
            entry = next((key for key in KERNELS if re.fullmatch(key, name)), None)
            if entry is None:
                bad.append("no entry in KERNELS of tests/cuda_cubin.py")
                continue
            allowed, meant = KERNELS[entry]
            if used > allowed:
                bad.append(f"{used} registers, of at most {allowed}")
            if wide < (max(total, 1) if meant == "all" else meant):
                bad.append(f"{wide} of {total} loads are of 16 bytes, and {meant} are meant")
        lines += [f"{name}: {'; '.join(bad)}"] if bad else []
    return lines


def compiled(source, architecture):
    """What ptxas says, and the PTX."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, f"-arch={architecture}", "-Xptxas", "-v", "-cubin", source]
        command += ["--keep", "--keep-dir", folder, "-o", f"{folder}/kernels.cubin"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"{done.stderr}{source} does not compile for {architecture}")
        return done.stderr, (Path(folder) / f"{Path(source).stem}.ptx").read_text()


def main(sources):
    wrong, names = [], set()
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = [arch for arch in ARCHITECTURES if f"compute_{arch[3:].rstrip('a')}" in listed.stdout]
    for source in sources:
        for architecture in known:
            said, ptx = compiled(source, architecture)
            loads = read_ptx(ptx)
            names |= {*loads}
            for line in faults(read_ptxas(said), loads, architecture):
                wrong.append(f"{source} for {architecture}: {line}")
            print(f"nvcc compiled {source} for {architecture}", flush=True)
    for key in KERNELS:
        if not any(re.fullmatch(key, name) for name in names):
            wrong.append(f"{key}: in KERNELS, and no kernel has this name")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main(sys.argv[1:])
