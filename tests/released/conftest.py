"""The tests of this folder share the builder of replicas."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
