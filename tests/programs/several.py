"""Train several configs in the same processes: a JSON list of [config, override, ...]."""

import json
import sys

from dist_train.run.api import train

if __name__ == "__main__":
    for path, *overrides in json.loads(sys.argv[1]):
        train(path, *overrides)
