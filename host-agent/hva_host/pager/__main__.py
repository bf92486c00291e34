"""``python -m hva_host.pager``."""

import sys

from hva_host.pager.main import main

if __name__ == "__main__":
    sys.exit(main())
