"""A torchrun worker: writes RANK.txt (whether it was forked, its parent, the world size); rank 1 fails."""

import os
import sys
from pathlib import Path

forked = "torch" in sys.modules
rank = os.environ["RANK"]
Path(f"{rank}.txt").write_text(f"{forked} {os.getppid()} {os.environ['WORLD_SIZE']}")
sys.exit(7 if rank == "1" else 0)
