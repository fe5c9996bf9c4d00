"""`python -m components.train`."""

import sys

from components.runtime.stage import entry_point
from components.train.launch import main

sys.exit(entry_point("train", main))
