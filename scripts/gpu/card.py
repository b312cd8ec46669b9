# SPDX-License-Identifier: Apache-2.0
"""Who the GPU is, as one line of JSON; or one line on why it will not do."""

from __future__ import annotations

import json
import subprocess
import sys

LEAST_CAPABILITY = (8, 0)
LEAST_FREE = 4 << 30


def refusal(
    capability: tuple[int, int], free: int, name: str, driver: str
) -> str | None:
    """Say why this card will not do, or ``None``."""
    if capability < LEAST_CAPABILITY:
        own, least = (".".join(map(str, c)) for c in (capability, LEAST_CAPABILITY))
        return (
            f"{name} has compute capability {own}; the kernels need {least}: use an "
            "Ampere GPU or a later one"
        )
    if free < LEAST_FREE:
        return (
            f"{name} has {free >> 20} MiB free; the smallest stage needs "
            f"{LEAST_FREE >> 20} MiB: end what else runs there (driver {driver})"
        )
    return None


def driver_version() -> str:
    """Ask nvidia-smi, if there is one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().split("\n")[0] or "unknown"


def main() -> int:
    """Print what there is."""
    import torch

    driver = driver_version()
    try:
        torch.cuda.init()
        capability = torch.cuda.get_device_capability()
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        print(
            f"no usable NVIDIA GPU ({reason}); driver {driver}, PyTorch is built for "
            f"CUDA {torch.version.cuda}: update the driver, or use --device cpu",
            file=sys.stderr,
        )
        return 1
    if why := refusal(capability, free, name, driver):
        print(why, file=sys.stderr)
        return 1
    found = {"card": name, "driver": driver, "capability": capability}
    found |= {"free_gib": round(free / 2**30, 1), "total_gib": round(total / 2**30, 1)}
    print(json.dumps({**found, "torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
