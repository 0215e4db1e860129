"""Train a classifier of handwritten digits that is too narrow for its task, and let Tamiyo widen it.

Start a server first (``esper serve``), then run ``python examples/grow_a_classifier.py``. To watch the decisions as
they are made, run ``python examples/watch_decisions.py`` beside it.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esperml import kasmina
from esperml.v1.graph_pb2 import RunLimits


def data() -> tuple[DataLoader[tuple[torch.Tensor, ...]], torch.Tensor, torch.Tensor]:
    """Batches for training, and the held-out inputs and targets."""
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    targets = torch.tensor(digits.target)
    train_x, held_x, train_y, held_y = train_test_split(inputs, targets, test_size=0.3, random_state=0)
    return DataLoader(TensorDataset(train_x, train_y), batch_size=32, shuffle=True), held_x, held_y


def main() -> None:
    """Train, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="localhost:50051", help="address of the server")
    parser.add_argument("--policy", default="", help="policy that decides; the server's default if not given")
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # The model is so small that a second thread would only wait.
    torch.manual_seed(0)
    loader, held_x, held_y = data()
    loss_function = nn.CrossEntropyLoss()
    # Three units in the middle cannot tell ten digits apart well.
    model = nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3), nn.ReLU(), nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 10)
    )

    def held_out_loss(module: nn.Module) -> float:
        return float(loss_function(module(held_x), held_y))

    kasmina.wrap(model, held_x[:2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with kasmina.connect(
        arguments.target,
        model,
        optimizer,
        run="grow-a-classifier",
        mode="act",
        evaluate=held_out_loss,
        policy=arguments.policy,
        limits=RunLimits(parameter_budget=3000, graft_parameter_budget=1000, warmup_steps=100),
    ) as session:
        for epoch in range(arguments.epochs):
            for inputs, targets in loader:
                optimizer.zero_grad()
                loss = loss_function(model(inputs), targets)
                loss.backward()
                optimizer.step()
                session.step(loss=loss, epoch=epoch)
    print(session.summary())
    with torch.no_grad():
        print(f"held-out loss at the end: {held_out_loss(model.eval()):.3f}")


if __name__ == "__main__":
    main()
