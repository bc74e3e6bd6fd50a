"""torchrun, without the traceback that it adds to what its processes have said.

``python -m pavdm_dist.train.torchrun``, with torchrun's own words; ends with the status of the first that failed, and
as at SIGTERM where the process that started it is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

# Variable that names the read end of a pipe; whoever started this process holds the other end, and never writes.
FOLLOWED = "PAVDM_FOLLOWED_PIPE"


def main() -> int:
    """As torchrun's own, for the words of this command line."""
    if followed := os.environ.pop(FOLLOWED, None):  # the processes that train follow this one
        os.set_inheritable(int(followed), False)
        threading.Thread(target=_follow, args=(int(followed),), daemon=True).start()
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


def _follow(pipe: int) -> None:
    """Tells this process to end, with a checkpoint and the exported model, when its starter has: nobody else would."""
    os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
