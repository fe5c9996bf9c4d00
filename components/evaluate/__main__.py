"""`python -m components.evaluate`."""

import sys

from components.evaluate.main import main
from components.runtime.stage import entry_point

sys.exit(entry_point("evaluate", main))
