"""Puts this folder on the module path: the fuzz targets are plain modules that also run without
pytest (run.py).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
