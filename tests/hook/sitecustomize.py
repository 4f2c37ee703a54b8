"""With this folder in PYTHONPATH, a real torchrun or `accelerate launch` forks its workers (see tests/forking.py)."""

import os
import sys

_words = [*sys.orig_argv[1:3], ""]
if (
    _words[:2] in (["-m", "torch.distributed.run"], ["-m", "accelerate.commands.launch"])
    or os.path.basename(_words[0]) in ("torchrun", "accelerate")
):  # fmt: skip
    _tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path.insert(0, _tests)
    import forking

    sys.path.remove(_tests)
    forking.be_launcher()
