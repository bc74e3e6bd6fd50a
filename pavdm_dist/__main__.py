"""``python -m pavdm_dist`` is the ``pavdm`` command."""

import sys

from pavdm_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
