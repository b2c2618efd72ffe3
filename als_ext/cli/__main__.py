"""``python -m als_ext.cli`` is ``als-ext``."""

import sys

from als_ext.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
