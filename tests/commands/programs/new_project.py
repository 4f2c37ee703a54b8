"""Make, train and predict with a new project, by the dist_train that is installed below the directory in argv."""

import os
import sys

import dist_train
from dist_train.main import main

assert dist_train.__file__.startswith(sys.argv[1])
assert main(["new", "project"]) == 0
os.chdir("project")
assert main(["--config", "config.yaml", "trainer.duration=6ep", "tracking.tensorboard=false"]) == 0
os.chdir("..")
assert main(["predict", "project/runs/moons", "--output", "out.csv"]) == 0
