"""torchrun, without the traceback that it adds to what its processes have said.

``python -m pavdm_dist.train.torchrun``, with torchrun's own words; ends with the status of the first that failed.
"""

from __future__ import annotations

import logging
import sys


def main() -> int:
    """As torchrun's own, for the words of this command line."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    logging.disable(logging.ERROR)  # it tells at length of processes that have said themselves what is wrong
    try:
        run(sys.argv[1:])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode  # as a shell says it
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
