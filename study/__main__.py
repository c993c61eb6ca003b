"""`python -m study`: the same as the command `study`."""

import sys

from study.cli import main

sys.exit(main())
