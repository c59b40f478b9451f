"""`python -m sawkv` is the `sawkv` command."""

import sys

from sawkv.cli import main

if __name__ == "__main__":
    sys.exit(main())
