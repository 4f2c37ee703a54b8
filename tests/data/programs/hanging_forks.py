"""Read a dataset by a forked worker; the first two forks hang before their interpreter runs."""

import json
import os
import time
from pathlib import Path


def hang_first():
    Path(f"fork-{os.getpid()}").touch()
    if len(list(Path().glob("fork-*"))) < 3:
        time.sleep(1000)


os.register_at_fork(after_in_child=hang_first)  # before the package's own

import torch  # noqa: E402

from dist_train.data import workers  # noqa: E402

workers._START_SECONDS, workers._FORKS_MAY_HANG = 0.3, True
loader = torch.utils.data.DataLoader(
    range(6),
    batch_size=2,
    num_workers=1,
    multiprocessing_context=workers.context_for("fork"),
    worker_init_fn=workers.init_worker,
)
batches = [batch.tolist() for batch in loader]
left = [str(path) for path in Path().glob("fork-*") if Path("/proc", path.name[5:]).exists()]
print(json.dumps({"batches": batches, "forks": len(list(Path().glob("fork-*"))), "left": left}))
