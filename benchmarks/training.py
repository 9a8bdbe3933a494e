"""What does the trainer cost beside a bare loop over the same network and batch?

    pip install -e ".[benchmarks]"
    python benchmarks/training.py            # a table; a few minutes on one thread

Protocol: the bundled model's U-Net (0.7M weights) on batches of 64 of 8x8 images, and one of 0.6M weights on 16 images
28x28, one thread, float32. The bare loop draws data, t and noise by torch.rand and torch.randn, and does forward,
backward, clipping, AdamW and the average of the weights, as any script would; "without average and clipping" leaves
these two out. Loops and trainer take turns of 20 steps, set-up counted; the ratio of a turn is that of neighbours in
the process's own CPU time, and medians over turns are printed. Memory is the peak resident set of a process that runs
one of the two and nothing else, less what the imports take.
"""

import argparse
import copy
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdekit import VPSDE
from sdekit.training.networks import build
from sdekit.training.trainer import train

PROBLEMS: dict[str, tuple[dict, tuple[int, ...], int]] = {
    "8x8, batch 64": ({"width": 32, "multipliers": (1, 2)}, (1, 8, 8), 64),
    "28x28, batch 16": ({"width": 16, "multipliers": (1, 2, 4)}, (1, 28, 28), 16),
}
COLUMNS = ("problem", "trainer / bare", "trainer / bare without average and clipping", "MB, trainer", "MB, bare")


def make(problem: str) -> tuple[nn.Module, Tensor, int]:
    arguments, event, batch = PROBLEMS[problem]
    data = torch.randn(1000, *event, generator=torch.Generator().manual_seed(0))
    return build("UNet", **arguments), data, batch


def bare(problem: str, *, whole: bool = True) -> Callable[[int], None]:
    """The loop as a script would have it, for VP and a network that predicts v."""
    network, data, batch = make(problem)
    average = copy.deepcopy(network) if whole else None
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def loop(steps: int) -> None:
        for _ in range(steps):
            x0 = data[torch.randint(len(data), (batch,), generator=generator)]
            t = torch.rand(batch, generator=generator)
            eps = torch.randn(x0.shape, generator=generator)
            log_alpha = (-0.5 * (0.1 * t + 9.95 * t**2))[:, None, None, None]
            alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
            loss = (network(alpha * x0 + sigma * eps, t) - (alpha * eps - sigma * x0)).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if average is not None:
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            if average is not None:
                with torch.no_grad():
                    for a, w in zip(average.parameters(), network.parameters(), strict=True):
                        a.lerp_(w, 1e-3)

    return loop


def trainer(problem: str) -> Callable[[int], None]:
    network, data, batch = make(problem)

    def loop(steps: int) -> None:
        train(network, VPSDE(), data, steps=steps, batch=batch, device="cpu")

    return loop


LOOPS: dict[str, Callable[[str], Callable[[int], None]]] = {
    "bare loop": bare,
    "bare loop, without average and clipping": lambda problem: bare(problem, whole=False),
    "trainer": trainer,
}


def seconds(run: Callable[[int], None], steps: int) -> float:
    """CPU time of the process, which other guests of the machine disturb least."""
    start = time.process_time()
    run(steps)
    return time.process_time() - start


def memory(problem: str, loop: str) -> float:
    """Peak megabytes of a process that runs one loop, over those after its imports."""
    command = [sys.executable, __file__, "--memory-of", loop, "--problem", problem]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak() -> float:
    """Megabytes at most so far, of this program alone (Linux: a child's ru_maxrss begins with its parent's)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def measure(problem: str, turns: int) -> dict[str, object]:
    """The row of a problem: ratios to both bare loops, and peak megabytes."""
    runs = {name: build_loop(problem) for name, build_loop in LOOPS.items()}
    for run in runs.values():
        run(2)
    taken = [{name: seconds(run, 20) for name, run in runs.items()} for _ in range(turns)]
    ratios = [round(statistics.median(t["trainer"] / t[name] for t in taken), 3) for name in list(LOOPS)[:2]]
    used = [round(memory(problem, name)) for name in ("trainer", "bare loop")]
    return dict(zip(COLUMNS, [problem, *ratios, *used], strict=True))


def table(rows: list[dict]) -> str:
    """Markdown; also of the CSV's rows, whose values are text."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        ratios = [f"{float(row[name]):.3f}" for name in COLUMNS[1:3]]
        lines.append("| " + " | ".join([row[COLUMNS[0]], *ratios, *(str(row[name]) for name in COLUMNS[3:])]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--memory-of", choices=LOOPS, help=argparse.SUPPRESS)
    parser.add_argument("--problem", choices=PROBLEMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        before = peak()
        LOOPS[options.memory_of](options.problem)(10)
        print(peak() - before)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [measure(problem, options.turns) for problem in PROBLEMS]
    print(f"torch {torch.__version__}, one thread, {options.turns} turns\n\n{table(rows)}")
    with open(options.out / "training.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
