"""A ServerApp as Flower's quickstart has it; one line chooses the strategy."""

import random

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from atm_fl.flower import TaskVectorStrategy
from quickstart.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and save the final weights where `out` says."""
    config = context.run_config
    random.seed(config["seed"])
    torch.manual_seed(config["seed"])
    strategy = FedAvg()
    if config["merge"]:
        strategy = TaskVectorStrategy(
            merge=config["merge"],
            server_optimizer=config["server-optimizer"],
            checkpoint_dir=config["checkpoint-dir"] or None,
        )
    arrays = ArrayRecord(Net().state_dict())
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=config["num-server-rounds"])
    if config["out"]:
        torch.save(result.arrays.to_torch_state_dict(), config["out"])
