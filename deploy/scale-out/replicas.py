# SPDX-License-Identifier: Apache-2.0
"""Several kvserve replicas on this machine, and vllm-router in front of them.

A small stand-in for what Kubernetes or compose does over machines: see
docs/scaling-out.md. Everything listens on loopback. A replica that ends is left as it
is; the router serves on with the others.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_EXAMPLES = """examples:
  python deploy/scale-out/replicas.py
  python deploy/scale-out/replicas.py --replicas 2 --port 8000 -- \\
      --policy retrieval --kv-cache-memory-bytes 1G --max-model-len 4096

What follows -- goes to every `kvserve serve`. Stop all with Ctrl-C.
"""
_HOST = "127.0.0.1"
_START_SECONDS = 600
_STOP_SECONDS = 60
_ROUTER_COMMAND = Path(sys.executable).with_name("vllm-router")
_ROUTER_FLAGS = [
    *("--policy", "round_robin"),
    # A dead replica is noticed by its first refused connection, which is tried again
    # elsewhere, and by its health a second later.
    *("--retry-max-retries", "3"),
    *("--health-check-interval-secs", "1", "--health-check-timeout-secs", "2"),
    *("--health-failure-threshold", "1", "--health-success-threshold", "1"),
    *("--worker-startup-check-interval", "1"),
]


@dataclass
class Replica:
    """A running ``kvserve serve`` with process group and log file of its own."""

    url: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    @classmethod
    def start(cls, port: int, flags: list[str], log: Path, cores: list[int]) -> Replica:
        command = [str(Path(sys.executable).with_name("kvserve")), "serve", *flags]
        command += ["--host", _HOST, "--port", str(port)]
        output = log.open("wb")
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        return cls(f"http://{_HOST}:{port}", process, output)

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                sys.exit(f"replicas: {self.url} did not start; see {self.log.name}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        sys.exit(f"replicas: {self.url} was not healthy in time; see {self.log.name}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Serve kvserve replicas behind vllm-router, on loopback.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--replicas", type=int, default=2, help="default: 2")
    parser.add_argument(
        "--port",
        type=int,
        default=8000,
        help="of the router (default: 8000); replicas take the ports behind it, and "
        "the router's metrics the next one",
    )
    parser.add_argument(
        "--logs", type=Path, default=Path(), help="folder of replica-N.log, router.log"
    )
    parser.add_argument("flags", nargs="*", help="flags of `kvserve serve`")
    return parser.parse_args()


def _deal_cores(replicas: int) -> list[list[int]]:
    """Divide the cores of this process; with too few, replicas share all of them."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < replicas:
        return [cores] * replicas
    return [cores[place::replicas] for place in range(replicas)]


def _start_router(
    replicas: list[Replica], port: int, log: Path
) -> subprocess.Popen[bytes]:
    command = [str(_ROUTER_COMMAND), *_ROUTER_FLAGS]
    command += ["--host", _HOST, "--port", str(port)]
    command += ["--prometheus-port", str(port + len(replicas) + 1)]
    command += ["--worker-urls", *(replica.url for replica in replicas)]
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _watch(replicas: list[Replica], router: subprocess.Popen[bytes]) -> None:
    """Say which replicas end, until the router or the last of them does."""
    running = list(replicas)
    while running and router.poll() is None:
        for replica in [r for r in running if r.process.poll() is not None]:
            running.remove(replica)
            print(f"{replica.url} ended; {len(running)} left", flush=True)
        time.sleep(0.5)


def main() -> None:
    args = _arguments()
    if not _ROUTER_COMMAND.exists():
        sys.exit("replicas: vllm-router is not installed; pip install 'kvserve[scale]'")
    args.logs.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        replicas = []
        for number, cores in enumerate(_deal_cores(args.replicas), start=1):
            log = args.logs / f"replica-{number}.log"
            replica = Replica.start(args.port + number, args.flags, log, cores)
            replicas.append(replica)
            processes.append(replica.process)
        for replica in replicas:
            replica.wait_until_healthy()
            print(f"replica {replica.url} process {replica.process.pid}", flush=True)
        router = _start_router(replicas, args.port, args.logs / "router.log")
        processes.insert(0, router)
        print(f"router http://{_HOST}:{args.port}", flush=True)
        _watch(replicas, router)
    except KeyboardInterrupt:
        pass
    finally:
        _stop(processes)


if __name__ == "__main__":
    main()
