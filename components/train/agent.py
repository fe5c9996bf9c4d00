"""The ranks' parent: torchrun that leaves the telling of a failure to who started it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from components.runtime.processes import die_with_parent


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with its own flags; 1 when a rank failed, 143 when told to stop."""
    die_with_parent()
    logging.disable(logging.ERROR)  # ranks leave the reason of a failure in a file
    try:
        torchrun.main(argv)
    except ChildFailedError:
        return 1
    except SignalException:
        return 143
    return 0


if __name__ == "__main__":
    sys.exit(main())
