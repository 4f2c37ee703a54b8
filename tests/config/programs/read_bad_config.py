"""Print the number of mistakes in x.yaml, and which heavy or user modules were imported to find them."""

import sys

from dist_train.config.errors import ConfigError
from dist_train.config.load import load_config

try:
    load_config("x.yaml")
except ConfigError as error:
    print(len(error.problems))
print([name for name in ("torch", "numpy", "mynet") if name in sys.modules])
