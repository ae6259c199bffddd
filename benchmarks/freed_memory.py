"""What it gains to keep freed memory (`runtime.device.prepare`), on a CPU, job by job."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import common

JOBS = [f"train_custom.py --recipe {recipe}" for recipe in ("classic", "modern", "speedrun")]
JOBS += ["finetune.py --arch resnet18"]

if __name__ == "__main__":
    common.with_and_without(__file__, __doc__, common.prepare, JOBS)
