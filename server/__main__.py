"""``python -m safelight.server [MODEL] [flags]``."""

import sys

from .launch import main

if __name__ == "__main__":
    sys.exit(main())
