"""Memory that is freed is kept: the system is not asked for its pages again."""

import subprocess
import sys

import pytest

# Tensors of 64 MiB, one after the other; the first few dozen spread over the heap, the last sixteen are counted
PROGRAM = """
import resource, torch
from unclip.core.memory import keep_memory
kept = {keep} and keep_memory()
for i in range(80):
    if i == 64:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted by Linux's rules")
def test_no_page_is_asked_for_again():
    found = {}
    for keep in (True, False):
        command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
        found[keep] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if found[True][0] != "True":
        pytest.skip("this C library has no mallopt")
    assert int(found[True][1]) < 100 < int(found[False][1])
