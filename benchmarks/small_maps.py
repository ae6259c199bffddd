"""What it gains to convolve small maps as matrix products (`runs.small_maps`), job by job.

On a CPU with AMX; on others nothing changes, and both sides are the same.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import common

RECIPES = "modern", "speedrun", "best", "modern --small-first=", "speedrun --small-first="
NETWORKS = "resnet18", "resnet50", "resnet18 --small-first=", "resnet18 --image-size 96"
JOBS = [f"train_custom.py --recipe {recipe}" for recipe in RECIPES]
JOBS += [f"finetune.py --arch {arch}" for arch in NETWORKS]

if __name__ == "__main__":
    common.with_and_without(__file__, __doc__, "as_products", JOBS)
