"""How this process was started: alone, or by torchrun as one of several. Needs no torch."""

import os

# What torchrun sets. Job systems export some of these names too: alone they mean nothing here.
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def _launched() -> dict[str, int]:
    """The numbers that torchrun gave this process; those of a process alone if any is missing."""
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    if not os.environ.get("MASTER_ADDR"):
        return alone
    try:
        found = {name: int(os.environ[name]) for name in _VARIABLES}
    except (KeyError, ValueError):
        return alone
    if 0 <= found["RANK"] < found["WORLD_SIZE"] and found["LOCAL_WORLD_SIZE"] > 0:
        return found
    return alone


_found = _launched()
RANK = _found["RANK"]  # of this process, from 0
WORLD_SIZE = _found["WORLD_SIZE"]  # processes that train together
LOCAL_RANK = _found["LOCAL_RANK"]  # of this process on its machine, from 0
LOCAL_WORLD_SIZE = _found["LOCAL_WORLD_SIZE"]  # processes on this machine
NUM_MACHINES = WORLD_SIZE // LOCAL_WORLD_SIZE
