"""The targets are plain modules, so that the fuzzer runs them without pytest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
