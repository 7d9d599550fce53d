"""`python -m moetool`."""

import sys

from moetool.cli import main

sys.exit(main())
