"""`python -m components.register`."""

import sys

from components.register.main import main
from components.runtime.stage import entry_point

sys.exit(entry_point("register", main))
