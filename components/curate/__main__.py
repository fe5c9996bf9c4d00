"""`python -m components.curate`."""

import sys

from components.curate.main import main
from components.runtime.stage import entry_point

sys.exit(entry_point("curate", main))
