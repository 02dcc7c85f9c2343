"""Run a command and measure it from outside: wall seconds and peak anonymous memory.

Anonymous memory (``RssAnon``) is what a process itself takes. Resident memory would count mapped pages of the
checkpoint too, which are page cache and given back on demand.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PERIOD = 0.01  # seconds between looks at /proc


@dataclass(frozen=True)
class Measured:
    """What one run of a command cost."""

    seconds: float
    cpu_seconds: float
    peak_anonymous_bytes: int
    output: str


def together(runs: Sequence[Measured]) -> Measured:
    """One after the other: what they took in all, and the highest peak; says what the last one said."""
    return Measured(
        sum(found.seconds for found in runs),
        sum(found.cpu_seconds for found in runs),
        max(found.peak_anonymous_bytes for found in runs),
        runs[-1].output,
    )


def run(command: Sequence[str], *, sync: bool = False) -> Measured:
    """Run `command`; with `sync` the time includes a final ``sync``, so that nothing is left unwritten.

    Raises:
        SystemExit: the command failed; shows what it said.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0

    def watch() -> None:
        nonlocal peak
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
            except OSError:
                return
            if found:
                peak = max(peak, int(found[1]) * 1024)
            time.sleep(_PERIOD)

    before = os.times()
    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({process.returncode}):\n{errors}")
    if sync:
        os.sync()
    seconds = time.perf_counter() - started
    after = os.times()
    cpu = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    return Measured(seconds, cpu, peak, output)
