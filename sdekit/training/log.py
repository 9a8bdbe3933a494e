"""What a run leaves to read: metrics.csv, a row per look at the loss, and log.txt, a line per event."""

import csv
import logging
import time
from pathlib import Path


class Metrics:
    """metrics.csv: a row per look at the loss; those past the step that a run goes on from are dropped."""

    fields = ("step", "loss", "gradient_norm", "samples_per_second")

    def __init__(self, folder: Path | None, done: int) -> None:
        self.path = None if folder is None else folder / "metrics.csv"
        self.step, self.time = done, time.perf_counter()
        if self.path is None:
            return
        kept = []
        if done and self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(self.fields) and row[0].isdigit()]
            kept = [row for row in rows if int(row[0]) <= done]
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.fields, *kept])

    def row(self, step: int, loss: float, norm: float, batch: int) -> None:
        """After ``step``: the mean since the row before of the losses that are finite, and the last gradient's norm
        before clipping.
        """
        now = time.perf_counter()
        if self.path is not None:
            rate = (step - self.step) * batch / max(now - self.time, 1e-9)
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([step, f"{loss:.6g}", f"{norm:.4g}", f"{rate:.1f}"])
        self.step, self.time = step, now


class Log:
    """Events, as warnings of the logger "sdekit" and as lines of log.txt, which appears with the first one.

    ``folder``: the run's, or None; ``heard``: False in all processes but the first.
    """

    def __init__(self, folder: Path | None, heard: bool) -> None:
        self.folder, self.heard = folder, heard

    def say(self, step: int, text: str) -> None:
        """One event, after ``step``."""
        if not self.heard:
            return
        logging.getLogger("sdekit").warning("step %d: %s", step, text)
        if self.folder is not None:
            with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
                file.write(f"step {step}: {text}\n")
