"""Runs the tests that need a GPU and writes their outcomes to results/gpu_tests.json.

Further arguments go to pytest; with pytest-xdist, `-n 12` compiles the kernels in parallel.
"""

import argparse
import sys
from pathlib import Path

import pytest
from record import RESULTS, environment, write


class Collector:
    def __init__(self):
        self.outcomes = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
            if report.outcome == "failed":
                lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
                self.outcomes[report.nodeid]["message"] = "\n".join(lines)[-600:]
                print(report.longreprtext[-600:])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options, extra = parser.parse_known_args()
    collector = Collector()
    # Where pytest-benchmark is installed it warns beside xdist, and warnings are errors.
    plugins = ("-p", "no:cacheprovider", "-p", "no:benchmark")
    status = pytest.main(["-m", "gpu", "-q", *plugins, *extra], plugins=[collector])
    counts = {o: sum(e["outcome"] == o for e in collector.outcomes.values()) for o in ("passed", "failed", "skipped")}
    write("gpu_tests", {"environment": environment("cuda"), **counts, "tests": collector.outcomes}, options.output)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
