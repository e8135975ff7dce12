"""FedAvg beside merges on a split of few classes a client, in this process: `python examples/flower_app/compare.py`."""

import logging
import random
import sys
import tomllib
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg

from atm_fl.flower import TaskVectorStrategy
from atm_fl.server.grid import InProcessGrid

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from quickstart.client_app import app  # noqa: E402
from quickstart.task import Net  # noqa: E402

CLIENTS, CLASSES, ROUNDS, SEEDS = 5, 2, 10, (0, 1, 2)
ROWS = {
    "FedAvg": {},
    "mean": {"merge": "mean"},
    "mean, momentum": {"merge": "mean", "server_optimizer": "momentum:learning-rate=1.0,momentum=0.5"},
    "task-arithmetic 0.4": {"merge": "task-arithmetic:scaling=0.4"},
    "ties": {"merge": "ties"},
    "tsv-m": {"merge": "tsv-m"},
    "iso-c": {"merge": "iso-c"},
}


def accuracies(row: str, seed: int) -> list[float]:
    """Test accuracy after each round."""
    config = tomllib.loads((HERE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    grid = InProcessGrid(app, CLIENTS, config | {"classes": CLASSES, "seed": seed})
    random.seed(seed)
    torch.manual_seed(seed)
    strategy = TaskVectorStrategy(**ROWS[row]) if ROWS[row] else FedAvg()
    strategy.min_evaluate_nodes, strategy.fraction_evaluate = 1, 0.2  # all have the same test images
    result = strategy.start(grid, ArrayRecord(Net().state_dict()), num_rounds=ROUNDS)
    return [record["accuracy"] for record in result.evaluate_metrics_clientapp.values()]


def main() -> None:
    """Print the table."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    print(f"{CLIENTS} clients with {CLASSES} classes each; test accuracy %, after round 5 and {ROUNDS}; seeds {SEEDS}")
    for row in ROWS:
        curves = torch.tensor([accuracies(row, seed) for seed in SEEDS]) * 100
        cells = [f"{curves[:, number - 1].mean():.1f} ± {curves[:, number - 1].std():.1f}" for number in (5, ROUNDS)]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
