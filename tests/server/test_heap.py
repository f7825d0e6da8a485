"""The server's memory goes back to the system."""

from __future__ import annotations

import os
import subprocess
import sys

BODIES = """
import psutil
from safelight.server.heap import give_back_large_blocks

MB = 2**20
own = psutil.Process()
give_back_large_blocks()
largest = bytearray(30 * MB)
del largest
before = own.memory_full_info().uss
bodies, small = [bytearray() for _ in range(20)], []
for _ in range(20):
    for body in bodies:
        body += bytes(MB // 4)
        small.append(bytes(1000))
held = own.memory_full_info().uss - before
del body, bodies
kept = own.memory_full_info().uss - before
print(held // MB, kept // MB)
"""


def test_a_large_body_does_not_make_the_server_keep_the_memory_of_all_smaller_ones() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}  # they would decide
    found = subprocess.run([sys.executable, "-c", BODIES], capture_output=True, text=True, check=True, env=own).stdout
    held, kept = map(int, found.split())
    assert held >= 100, "what arrives is held"
    assert kept < held / 3, "what bodies had before they were large, between small objects"
