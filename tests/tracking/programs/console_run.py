"""What a training of 40 steps prints; `unicode`: with a model name that ASCII lacks."""

import sys
import time
from pathlib import Path

from dist_train.tracking.console import Console
from dist_train.tracking.live import Beside

console = Console(True)
console.start_block(
    [("model", "\u6570\u5b57" if "unicode" in sys.argv else "DigitsCNN"), ("batch", "64 = 4 ranks x 16")]
)
console.begin(0, 40, 1, 4)
for step in range(1, 41):
    console.step = step
    time.sleep(0.03)
    if step % 10 == 0:
        console.progress(step, 40, step // 10, {"loss": 1 / step, "lr": 0.1, "samples_per_s": 12345.6})
        beside = Beside(step // 10, {"loss": 20 / step}, {"lr": 0.1}, "accuracy", best=step != 30)
        console.evaluation("val", step, {"loss": 2 / step, "accuracy": 1 - 1 / step}, beside)
    if step == 20:
        console.warn("something to know")
        print("a line of the user's own")
console.end_block([("test accuracy", "0.98")])
console.close()
Path("done.txt").write_text("yes")
