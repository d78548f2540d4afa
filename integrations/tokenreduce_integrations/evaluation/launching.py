"""Starting a command again as several processes that share its work."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

#: Set in every process that a launcher started: torchrun's, and accelerate's.
_LAUNCHED = "LOCAL_RANK"


def launch(processes: int, arguments: Sequence[str]) -> None:
    """Become the launcher of several processes that run this command; returns in each of those.

    Args:
        processes: how many.
        arguments: of the command line.
    """
    if processes == 1 or _LAUNCHED in os.environ:
        return
    # A launcher would choose one thread a process anyway, with a warning.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, "-m", *torchrun, "-m", "tokenreduce_integrations.cli", *arguments]
    os.execv(sys.executable, command)
