"""`python -m kalman_conversion` is `kalman-convert`."""

import sys

from .cli import main

sys.exit(main())
