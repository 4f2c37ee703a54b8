"""Carry out several commands, a JSON list of their arguments, in one process."""

import json
import sys

from dist_train.main import main

for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0, arguments
