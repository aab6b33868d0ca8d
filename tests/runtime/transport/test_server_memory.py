"""The memory of a server over gRPC stays within its budget, whatever the number of sites."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fl_runtime.transport.turns import MEMORY_MIB

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own figures of a process")
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts the heaps of glibc")

HEAPS = """
import ctypes, threading, xml.etree.ElementTree as tree
from fl_runtime.transport.malloc import use_one_arena

use_one_arena()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.open_memstream.restype = ctypes.c_void_p
all_hold_a_block = threading.Barrier(9)

def hold():
    assert libc.malloc(ctypes.c_size_t(100_000))
    all_hold_a_block.wait()
    all_hold_a_block.wait()

threads = [threading.Thread(target=hold) for _ in range(8)]
for thread in threads:
    thread.start()
all_hold_a_block.wait()
text, size = ctypes.c_char_p(), ctypes.c_size_t()
stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
libc.malloc_info(0, stream)
libc.fclose(stream)
print(len(tree.fromstring(text.value).findall("heap")))
all_hold_a_block.wait()
"""


def of_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@GLIBC
def test_all_threads_of_a_server_take_memory_from_one_heap() -> None:
    assert int(of_python(HEAPS)) == 1


@LINUX
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "mutual TLS"])
def test_large_models_of_32_sites_take_no_more_of_the_servers_memory_than_it_may_have(plain: bool) -> None:
    code = f"import memory; print(memory.most_of_server(32, 16, plain={plain}).own_mib)"
    assert float(of_python(code)) < MEMORY_MIB
