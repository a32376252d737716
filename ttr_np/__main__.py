"""``python -m ttr_np`` is the ``ttr`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
