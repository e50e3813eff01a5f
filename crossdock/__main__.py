"""``python -m crossdock``, for where the ``crossdock`` command is not on the path."""

import sys

from crossdock.cli import main

if __name__ == "__main__":
    sys.exit(main())
