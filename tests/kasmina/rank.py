"""One of two processes that train together: ``python rank.py RANK FOLDER`` leaves in the folder what came of it."""

from __future__ import annotations

import datetime
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from esperml import kasmina
from esperml.kasmina.errors import KasminaError
from esperml.v1 import decision_pb2, event_pb2

BATCH = 16
Command = decision_pb2.Command


def model_of(width: int = 6) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 3)]
    return kasmina.wrap(nn.Sequential(*layers), torch.ones(4, 8))


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 8, generator=generator)
    return x, (x[:, 0].sign() + 1).long()


def germinate(decision_id: str, source: str, target: str, blend_steps: int = 10) -> Command:
    return Command(
        decision_id=decision_id,
        target=decision_pb2.Target(source_layer=source, target_layer=target),
        action=decision_pb2.Action(
            germinate=decision_pb2.Germinate(blueprint="mlp", parameter_budget=200, blend_steps=blend_steps)
        ),
    )


def on_seed(decision_id: str, seed_id: str, **action: object) -> Command:
    target = decision_pb2.Target(seed_id=seed_id)
    return Command(decision_id=decision_id, target=target, action=decision_pb2.Action(**action))


class Script:
    """A controller that sends each command at its step, and counts what it is told."""

    def __init__(self, run: str, commands: dict[int, Command]) -> None:
        self.told = 0
        self.step = 0
        self._run = run
        self._commands = commands
        self.link = kasmina.LocalLink(self._answer)

    def _answer(self, _kind, _event):
        self.told += 1
        due = [step for step in self._commands if step <= self.step]
        events = [event_pb2.Event(run_id=self._run, command=self._commands.pop(step)) for step in sorted(due)]
        return [(event_pb2.KIND_COMMANDS, event) for event in events]


CHANGES = {
    10: germinate("d-one", "0", "2"),
    20: germinate("d-two", "4", "4", blend_steps=0),
    50: on_seed("d-cull", "seed-d-two", cull=decision_pb2.Cull()),
    60: on_seed("d-keep", "seed-d-one", fossilise=decision_pb2.Fossilise()),
    70: germinate("d-three", "2", "2"),
    80: on_seed("d-still", "seed-d-three", set_alpha=decision_pb2.SetAlpha(alpha=0)),
    90: on_seed("d-louder", "seed-d-three", set_alpha=decision_pb2.SetAlpha(alpha=0.5)),
}


def train(name, commands, rank, size, *, steps=100, parts=1, poison=0, before=None, static=False, **settings):
    """Train for so many steps on this rank's share of each batch. What came of it, for the test."""
    model = model_of()
    trained = DistributedDataParallel(model, static_graph=static) if size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30, 0.8)
    script = Script(name, dict(commands))
    settings = {"mode": "act", "report_every": 5, "overhead_ceiling": None, **settings}
    losses, alphas = [], []
    with kasmina.connect(script.link, trained, optimizer, run=name, scheduler=scheduler, **settings) as session:
        if before is not None:
            before(session, rank)
        for step in range(1, steps + 1):
            script.step = step
            torch.manual_seed(step)  # The same newborn weights, however many processes there are.
            x, y = (tensor.chunk(size)[rank] for tensor in data(step))
            for part, (xs, ys) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
                last = part == parts - 1
                with nullcontext() if last or size == 1 else trained.no_sync():
                    loss = functional.cross_entropy(trained(xs), ys) / parts
                    loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if step == poison:
                explode(kasmina.host_of(model))
            optimizer.step()
            session.step(loss=loss)
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            alphas.append([seed.alpha for seed in kasmina.host_of(model).seeds.values()])
        host = kasmina.host_of(model)
        found = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict()["state"],
            "seeds": [(s.seed_id, s.stage, s.alpha, s.age, s.steps_in_stage) for s in host.seeds.values()],
            "structure_version": host.structure_version,
            "failure": session.failure,
            "actions": [words for _, words in session.summary().actions],
            "reports": session.summary().reports,
            "losses": losses,
            "alphas": alphas,
        }
    return {**found, "told": script.told}


def held_out(model):
    x, y = data(0)
    return functional.cross_entropy(model(x), y)


def explode(host):
    """Give the seeds of ``host`` weights that no loss survives."""
    with torch.no_grad():
        for seed in host.seeds.values():
            for parameter in seed.body.parameters():
                parameter.mul_(1e30)


def break_the_second(session, rank):
    """Have the session of rank 1 refuse what rank 0 grows."""
    if rank == 1:
        session._grafter.surgery._scheduler = None


def refusals(rank):
    """What is refused, in words."""
    found = {}
    other = model_of(width=6 + rank)
    for about, model, settings in (
        ("host", other, {}),
        ("run", model_of(), {"run": f"r-{rank}"}),
    ):
        settings = {"run": "r", **settings}
        try:
            kasmina.connect(Script("r", {}).link, model, torch.optim.SGD(model.parameters()), **settings)
        except KasminaError as error:
            found[about] = str(error)
    return found


def alone(rank):
    """Each process trains a model of its own."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    script = Script(f"own-{rank}", {1: germinate("d-own", "0", "2")} if rank else {})
    with kasmina.connect(
        script.link, model, optimizer, run=f"own-{rank}", mode="act", report_every=5, distributed=False
    ) as session:
        for step in range(1, 11):
            script.step = step
            functional.cross_entropy(model(data(step)[0]), data(step)[1]).backward()
            optimizer.step()
            session.step()
    return session.decisions_applied


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {
        "changes": train("changes", CHANGES, rank, 2),
        "parts": train("parts", CHANGES, rank, 2, parts=2),
        "static": train("static", CHANGES, rank, 2, static=True, evaluate=held_out),
        "quiet": train("quiet", {}, rank, 2, steps=20),
        "poison": train("poison", {10: germinate("d-one", "0", "2")}, rank, 2, poison=90, steps=110),
        "broken": train("broken", {10: germinate("d-one", "0", "2")}, rank, 2, steps=30, before=break_the_second),
        "refused": refusals(rank),
        "alone": alone(rank),
    }
    dist.destroy_process_group()
    torch.save(found, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
