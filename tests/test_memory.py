import subprocess
import sys

STEPS = """
import resource, sys
import torch
from alignkit.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for step in range(16):
    if step == 12:  # what is kept has settled
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    several = [torch.ones(12_000_000) for _ in range(3)]  # 48 MB each: more than glibc ever keeps by itself
    del several
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(memory: str) -> int:
    done = subprocess.run([sys.executable, "-c", STEPS, memory], check=True, capture_output=True, text=True)
    return int(done.stdout)


def test_memory_that_was_freed_is_used_again_without_asking_the_system() -> None:
    assert faults("kept") < 1_000
    assert faults("given back") > 30_000
