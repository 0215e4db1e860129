"""Gathers experience: many hosts, one static twin each, and branches whose behaviour is drawn at random.

Logs of a policy that always does the same teach nothing about what else could have been done. So the branches run under
the policy ``explore``, which draws time, place and blueprint and logs with which probability it did. One recording a
host, written under a temporary name and renamed when it is whole: what has its final name is complete.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import structlog

from esperml.client.recording import Recorder
from esperml.kasmina import LocalLink
from esperml.settings import TamiyoSettings
from esperml.tamiyo.controller import Controller
from esperml.tamiyo.store import PolicyStore
from esperml.trainer.arena.hosts import Family, HostSpec, sample_hosts
from esperml.trainer.arena.twins import Plan, train_twin
from esperml.v1 import event_pb2

log = structlog.get_logger(__name__)

PACES: Final = (0.8, 0.8, 1.0, 1.0, 1.0, 1.6, 2.0)
"""Factors by which the plans of hosts are stretched, each as likely: what is learned must not hang on one cadence."""

MANIFEST: Final = "collection.json"
_PARTIAL: Final = ".partial"


class CollectionError(RuntimeError):
    """A collection cannot be started or carried on as asked."""


@dataclass(frozen=True, slots=True)
class Collection:
    """What is collected.

    Attributes:
        hosts: number of hosts.
        branches: runs under ``explore`` per host, besides the static twin.
        seed: of the hosts and of all behaviour.
        plan: how each run goes.
        task: name of the one task that hosts are drawn for; all tasks where it is empty.
        pace: factor by which every plan is stretched; one of :data:`PACES` per host where it is absent.
    """

    hosts: int
    branches: int
    seed: int
    plan: Plan = field(default_factory=Plan)
    task: str = ""
    pace: float | None = None

    def __post_init__(self) -> None:
        for name in ("hosts", "branches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")

    def manifest(self) -> dict[str, Any]:
        """What decides the content of the recordings; ``hosts`` does not, since more can be added later."""
        return {key: value for key, value in asdict(self).items() if key != "hosts"}

    def specs(self) -> list[HostSpec]:
        """The hosts, in order. Raises ``ValueError`` where there is no such task."""
        family = Family()
        if self.task and self.task not in family.tasks:
            raise ValueError(f"task: {self.task!r} is none of {', '.join(family.tasks)}")
        return sample_hosts(self.hosts, self.seed, replace(family, tasks={self.task: 1.0}) if self.task else family)

    def plan_of(self, spec: HostSpec) -> Plan:
        """The plan of one host, at its pace."""
        return self.plan.stretched(self.pace or random.Random(spec.seed).choice(PACES))


def recording_path(folder: Path, index: int, spec: HostSpec) -> Path:
    """Where the recording of host number ``index`` stands."""
    return folder / f"{index:04d}-{spec.name}.mcap"


def collect(
    folder: Path,
    collection: Collection,
    *,
    jobs: int = 1,
    resume: bool = False,
    on_host: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Collect into ``folder`` and return the recordings, one a host.

    Args:
        folder: made where it does not exist.
        collection: what to collect.
        jobs: processes.
        resume: carry on with what is there. Recordings that are whole are kept; the same hosts and the same random
            draws follow, so that an interrupted collection ends as one that was not.
        on_host: called with (hosts done, hosts in all), first with those that were there.

    Raises:
        CollectionError: the folder holds a collection and ``resume`` is False, or one that was made otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_manifest(folder, collection, resume=resume)
    specs = collection.specs()
    paths = [recording_path(folder, index, spec) for index, spec in enumerate(specs)]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    done = len(paths) - len(missing)
    if on_host:
        on_host(done, len(paths))
    for _ in _each(paths, specs, missing, collection, jobs):
        done += 1
        if on_host:
            on_host(done, len(paths))
    return paths


def _each(
    paths: list[Path], specs: list[HostSpec], missing: list[int], collection: Collection, jobs: int
) -> Iterator[None]:
    """Collect the missing hosts, and yield after each."""
    if jobs == 1:
        for index in missing:
            collect_host(paths[index], specs[index], collection)
            yield
        return
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker) as pool:
        futures = [pool.submit(collect_host, paths[index], specs[index], collection) for index in missing]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _begin_worker() -> None:
    """Prepare a worker, and see that it does not outlive the collection: a killed parent cannot tell it to stop."""
    quiet_process()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def collect_host(path: Path, spec: HostSpec, collection: Collection) -> None:
    """Train the static twin and the branches of one host and record them to ``path``, whole or not at all."""
    partial = path.with_name(path.name + _PARTIAL)
    partial.unlink(missing_ok=True)
    settings = TamiyoSettings(
        policy="explore",
        health_threshold=1.0,
        confidence_threshold=0.0,  # Holding back what is improbable would take the randomness away.
        cull_below=0.0,  # What does no harm stays, so that its worth shows over the whole run.
        random_seed=collection.seed,
    )
    plan = collection.plan_of(spec)
    with Recorder(partial) as recorder:
        controller = Controller(PolicyStore.from_settings(settings), settings)

        def link() -> LocalLink:
            return LocalLink(controller.handle, sink=lambda kind, event: _keep(recorder, kind, event))

        static = f"{spec.name}/static"
        _train(spec, plan, link(), run=static, mode="observe", policy="nothing")
        for branch in range(collection.branches):
            run = f"{spec.name}/branch-{branch}"
            _train(spec, plan, link(), run=run, policy="explore", paired_run=static)
    with partial.open("rb") as whole:
        os.fsync(whole.fileno())
    partial.rename(path)


def _train(spec: HostSpec, plan: Plan, link: LocalLink, **arguments: Any) -> None:
    result = train_twin(spec, plan, link, **arguments)
    if result.failure:
        raise CollectionError(f"run {result.run} is of no use, its session failed at {result.failure}")


def _keep(recorder: Recorder, kind: event_pb2.Kind.ValueType, event: event_pb2.Event) -> None:
    """Record all but telemetry and commands: experience holds the states, and decisions what was commanded."""
    if kind not in (event_pb2.KIND_TELEMETRY, event_pb2.KIND_COMMANDS):
        recorder.write(kind, event)


def _check_manifest(folder: Path, collection: Collection, *, resume: bool) -> None:
    path = folder / MANIFEST
    wanted = json.loads(json.dumps(collection.manifest()))
    if not path.exists():
        if any(folder.glob("*.mcap")):
            raise CollectionError(f"{folder} holds recordings but no {MANIFEST}: choose another folder")
        path.write_text(json.dumps(wanted, indent=2) + "\n")
        return
    if not resume:
        raise CollectionError(f"{folder} holds a collection: choose another folder, or carry on with --resume")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise CollectionError(f"{path} is not JSON ({error}): choose another folder") from error
    if found != wanted:
        differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        raise CollectionError(f"{folder} was collected with another {', '.join(differing)}: choose another folder")


def quiet_process() -> None:
    """One thread for torch, and no log lines for every seed that is planted."""
    import logging

    import torch

    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
