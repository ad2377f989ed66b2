"""`python -m wavear`."""

import sys

from wavear.cli import main

sys.exit(main())
