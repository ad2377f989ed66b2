"""`python -m wavear`."""

import sys

from wavear.cli.commands import main

sys.exit(main())
