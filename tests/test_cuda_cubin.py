"""The check of what ptxas says of the CUDA kernels, on recorded lines: it fails where it must."""

import shutil

import cuda_cubin
import pytest

if not shutil.which("c++filt"):
    pytest.skip("c++filt is not here", allow_module_level=True)

SPACE = "_ZN17sparse_transcoder4cuda41_GLOBAL__N__a140a4dd_9_select_cu_1c02deb3"
SELECT = f"{SPACE}13select_kernelIfEEvPKfS4_PKNS_6MarginEiiiNS0_7WeightsENS0_14CandidateListsE"
MERGE = f"{SPACE}12merge_kernelEPKNS_6MarginENS0_7WeightsENS0_14CandidateListsE"
PRODUCT = f"{SPACE}23product_few_rows_kernelIfLi8ELi4EEEvPKfiPKT_llPf"
OTHER = f"{SPACE}12other_kernelIfEEvPKfS4_"
MAKE_ROOM = (
    "_ZN39_INTERNAL_a140a4dd_9_select_cu_1c02deb3"
    "17sparse_transcoder4cuda41_GLOBAL__N__a140a4dd_9_select_cu_1c02deb3"
    "9make_roomIfEEvRKNS2_9OpenListsEPKffRKNS1_7WeightsE"
)
WIDE = ["ld.global.nc.v4.f32 \t{%f1, %f2, %f3, %f4}, [%rd1];"] * 8
NARROW = ["@%p1 ld.global.f32 \t%f5, [%rd1+16];"]


def said(name, stack=0, stored=0, loaded=0, registers=None):
    """ptxas's lines about a kernel or, without registers, a function that a kernel calls."""
    lines = [f"ptxas info    : Function properties for {name}"]
    lines += [
        f"    {stack} bytes stack frame, {stored} bytes spill stores, {loaded} bytes spill loads"
    ]
    if registers is not None:
        lines.insert(0, f"ptxas info    : Compiling entry function '{name}' for 'sm_90a'")
        lines += [
            f"ptxas info    : Used {registers} registers, used 1 barriers, 5160 bytes smem",
            "ptxas info    : Compile time = 251.122 ms",
        ]
    return "\n".join(lines) + "\n"


def ptx(name, loads):
    return "\n".join([f".visible .entry {name}(", "\t.param .u64 first", ")", "{", *loads, "}", ""])


def faults(ptxas, entries, architecture="sm_90a"):
    read = cuda_cubin.read_ptxas(ptxas), cuda_cubin.read_ptx(entries)
    return cuda_cubin.faults(*read, architecture)


@pytest.mark.parametrize(
    "ptxas, entries, line",
    [
        (said(SELECT, registers=64), ptx(SELECT, WIDE + NARROW), None),
        (said(PRODUCT, registers=80), ptx(PRODUCT, WIDE), None),
        (
            said(SELECT, 328, 20, 16, registers=64),
            ptx(SELECT, WIDE),
            "select_kernel<float>: a stack frame of 328 bytes; "
            "spills: 20 bytes stored and 16 loaded",
        ),
        (
            said(MERGE, 32, registers=48),
            ptx(MERGE, []),
            "merge_kernel: a stack frame of 32 bytes",
        ),
        (
            said(SELECT, registers=64) + said(MAKE_ROOM, 0, 700, 848),
            ptx(SELECT, WIDE),
            "make_room<float>: spills: 700 bytes stored and 848 loaded",
        ),
        (
            said(MERGE, registers=65),
            ptx(MERGE, []),
            "merge_kernel: 65 registers, of at most 64",
        ),
        (
            said(OTHER, registers=8),
            ptx(OTHER, []),
            "other_kernel<float>: no entry in KERNELS of tests/cuda_cubin.py",
        ),
        (
            said(SELECT, registers=64),
            ptx(SELECT, WIDE[1:] + NARROW),
            "select_kernel<float>: 7 of 8 loads are of 16 bytes, and 8 are meant",
        ),
        (
            said(PRODUCT, registers=80),
            ptx(PRODUCT, WIDE + NARROW),
            "product_few_rows_kernel<float, 8, 4>: 8 of 9 loads are of 16 bytes, and all are meant",
        ),
        ("", ptx(MERGE, []), "merge_kernel: ptxas says nothing of it"),
    ],
)
def test_the_check_fails_where_it_must(ptxas, entries, line):
    assert faults(ptxas, entries) == ([] if line is None else [line])


def test_each_kernel_has_lines_of_its_own():
    ptxas = said(MERGE, 8, registers=48) + said(SELECT, registers=64) + said(MAKE_ROOM)
    entries = ptx(MERGE, NARROW) + ptx(SELECT, WIDE)
    assert faults(ptxas, entries) == ["merge_kernel: a stack frame of 8 bytes"]


def test_a_few_bytes_may_spill_where_they_are_listed():
    entries = ptx(PRODUCT, WIDE)
    for stored, architecture, fine in ((16, "sm_100", 1), (17, "sm_100", 0), (16, "sm_90a", 0)):
        lines = faults(said(PRODUCT, 8, stored, 16, registers=80), entries, architecture)
        assert len(lines) == 1 - fine, (stored, architecture)
