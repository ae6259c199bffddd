"""What it gains to keep freed memory (`runtime.device.prepare`), on a CPU, job by job."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import common

JOBS = [
    "train_custom.py --recipe classic",
    "train_custom.py --recipe modern",
    "train_custom.py --recipe speedrun",
    "finetune.py --arch resnet18",
]

if __name__ == "__main__":
    common.compare(__file__, __doc__, {"keep_memory": False}, JOBS)
