"""What sampling and training cost on a GPU: one script of at most eight minutes, whose results are kept as they come.

    pip install -e ".[benchmarks]"                    # ".[peers]" for diffusers' loop beside ours
    python benchmarks/gpu.py                          # on the GPU; nothing is downloaded
    python benchmarks/gpu.py --only share waits       # some parts
    python benchmarks/gpu.py --small --device cpu     # does it run? seconds, for CI; its numbers say nothing

Protocol: random networks, by --seed (0), in float32 as torch comes (what it allows in TF32 stands in the file), a U-Net
of 33M weights and 10 GFLOP an image at 32 x 32 where no other is named. A time is that from the call to the result, the
device waited for at both ends and nowhere between; all are medians over seven turns (fewer where these take over ten
seconds) after one that is left out, and a ratio is the median over turns of neighbours. The parts, in the order of what
is to be known first:

share      of a call's time in the network: CUDA events around its calls, which nobody waits for
waits      of the host between the first and the last call of the network, in ten steps: torch's sync debug mode
diffusers  its loop of 20 steps (as DDIMPipeline has it) and our sampler of that name, on one UNet2DModel
bf16       a network in bfloat16 under a float32 state: time, and how far the result moves
training   images a second by sdekit.training.train, from the difference of two runs
memory     at most in use by a call at batch 64, and by the network alone
overhead   of an evaluation whose network is free, over a loop y = a y + b d (with a randn where the sampler draws)
compile    torch.compile of the network, its first call apart; graph breaks in one evaluation of the score

A part that fails leaves its error, and the others go on. After --minutes the row in hand is left, and the parts that
were not begun say so. Every row is written to gpu.jsonl when it is there, a line of JSON each; a run begins with a line
that says device, versions, date, seed and protocol, and is added to the file, never put over another.
"""

import argparse
import gc
import json
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_measure import FULL, SMALL, Setting
from gpu_parts import PARTS, Row, UnavailableError

import sdekit

ROOT = Path(__file__).resolve().parent.parent
OWN = (str(ROOT / "sdekit"), str(ROOT / "benchmarks"))
Write = Callable[[dict[str, Any]], None]


def about(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """What a reader of the results must know."""
    memory = torch.cuda.get_device_properties(setting.device).total_memory / 2**30 if setting.cuda else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if setting.cuda else f"CPU, {torch.get_num_threads()} threads",
        "memory_GiB": memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32},
        "python": platform.python_version(),
        "sdekit": sdekit.__version__,
        "seed": setting.seed,
        "minutes": options.minutes,
        "scale": setting.scale._asdict(),
        "protocol": " ".join((__doc__ or "").split("Protocol: ")[1].split("A part that fails")[0].split()),
    }


class SpentError(BaseException):
    """The budget is spent: no Exception, which a library might take for a failure of its own."""


@contextmanager
def until(end: float) -> Iterator[None]:
    """SpentError in the block when the time has come, at the next line of Python; only later rows where no alarm is."""

    def spent(*_: object) -> None:
        raise SpentError

    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, spent)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, end - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(name: str, setting: Setting, end: float, write: Write) -> dict[str, Any]:
    """The rows of a part, written as they come, then how it ended: done, cut, skipped or failed."""
    start = time.monotonic()
    rows: list[Row] = []
    ending: dict[str, Any] = {"part": name, "status": "done"}
    if start >= end:
        ending |= {"status": "skipped", "reason": "the budget of --minutes was spent before it"}
    else:
        try:
            with until(end):
                for row in PARTS[name](setting):
                    rows.append(row)
                    write({"part": name, "row": row})
                    if time.monotonic() >= end:
                        raise SpentError
        except SpentError:
            ending |= {"status": "cut", "reason": f"the budget of --minutes was spent after {len(rows)} rows"}
        except UnavailableError as error:
            ending |= {"status": "skipped", "reason": str(error)}
        except Exception as error:  # a device has many ways to fail, and the other parts are still wanted
            places = traceback.extract_tb(error.__traceback__)
            place = [p for p in places if p.filename.startswith(OWN)][-1]  # not where torch gave up
            at = f"{Path(place.filename).relative_to(ROOT)}:{place.lineno}"
            ending |= {"status": "failed", "reason": f"{type(error).__name__} at {at}: {error}"}
    ending["seconds"] = round(time.monotonic() - start, 1)
    write(ending)
    report(rows, ending)
    gc.collect()  # the part's networks, before the next one's
    if setting.cuda:
        torch.cuda.empty_cache()
    return ending


def report(rows: list[Row], ending: dict[str, Any]) -> None:
    """A part's rows as tables, one for each kind of row, and its ending."""
    reason = f": {ending['reason']}" if "reason" in ending else ""
    print(f"\n{ending['part']}: {ending['status']} in {ending['seconds']:g} s{reason}")
    for columns in dict.fromkeys(tuple(row) for row in rows):
        lines = [list(columns), *([cell(v) for v in row.values()] for row in rows if tuple(row) == columns)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    sys.stdout.flush()


def cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda unless given")
    parser.add_argument("--small", action="store_true", help="tiny networks and few turns, to see whether it runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--skip", nargs="+", choices=PARTS, metavar="PART", default=[])
    parser.add_argument("--minutes", type=float, default=8.0, help="after these no further row is begun (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="a folder, for gpu.jsonl")
    options = parser.parse_args(arguments)
    if not options.minutes >= 0:
        parser.error(f"--minutes must be at least 0, got {options.minutes:g}")
    if options.seed < 0:
        parser.error(f"--seed must be at least 0, got {options.seed}")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.exit(1, f"torch {torch.__version__} finds no CUDA device here; --device cpu runs all that needs none\n")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    end = time.monotonic() + 60 * options.minutes
    cuda = options.device != "cpu"
    setting = Setting(torch.device("cuda" if cuda else "cpu"), cuda, SMALL if options.small else FULL, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "gpu.jsonl", "a", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        run = about(setting, options)
        write({"run": run})
        print(f"{run['device']}, torch {run['torch']}, CUDA {run['cuda']}, {run['date']}, seed {run['seed']}")
        for name in PARTS:
            if name in options.skip or name not in (options.only or PARTS):
                write({"part": name, "status": "skipped", "reason": "not asked for"})
            else:
                run_part(name, setting, end, write)
    print(f"\nwritten to {options.out / 'gpu.jsonl'}")


if __name__ == "__main__":
    main()
