import subprocess
import sys

PROGRAM = """
import resource
import sys
import numpy as np
from flsep.trainer.training.launch import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    np.ones(1 << 23, np.uint8)  # 8 MiB, allocated and freed again
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(1 << 23, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_page_faults(way: str) -> int:
    environment = {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # as for blocks of more than 32 MiB
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, way],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return int(process.stdout)


def test_freed_blocks_are_used_again() -> None:
    assert count_page_faults("keep") < count_page_faults("give back") / 4
