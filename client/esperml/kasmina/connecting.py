"""Connecting a training run: what the user asks for is checked here, and a session made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Literal

from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from esperml.client.credentials import Credentials
from esperml.kasmina.budget import CEILING
from esperml.kasmina.distributed import check_same, session_of
from esperml.kasmina.errors import KasminaError
from esperml.kasmina.evaluation import Evaluator
from esperml.kasmina.figures import client_version
from esperml.kasmina.governor import GovernorOptions
from esperml.kasmina.grpc_link import SPOOLED, GrpcLink
from esperml.kasmina.host import host_of
from esperml.kasmina.link import Link, LocalLink
from esperml.kasmina.ranks import ranks_of
from esperml.kasmina.session import Session
from esperml.kasmina.spool import SpoolOptions
from esperml.kasmina.surgery import why_closed
from esperml.v1 import decision_pb2, graph_pb2, run_pb2

GOVERNED: Final = GovernorOptions()
"""How a run is guarded unless it asks otherwise."""

ModeName = Literal["observe", "advise", "act"]

_MODES: Final[Mapping[str, decision_pb2.Mode.ValueType]] = {
    "observe": decision_pb2.MODE_OBSERVE,
    "advise": decision_pb2.MODE_ADVISE,
    "act": decision_pb2.MODE_ACT,
}


def connect(
    target: str | Link,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    run: str,
    scheduler: object | None = None,
    evaluate: Evaluator | None = None,
    mode: ModeName = "advise",
    limits: graph_pb2.RunLimits | None = None,
    policy: str = "",
    paired_run: str = "",
    labels: Mapping[str, str] | None = None,
    report_every: int = 50,
    evaluate_every: int | None = None,
    overhead_ceiling: float | None = CEILING,
    governor: GovernorOptions | None = GOVERNED,
    credentials: Credentials | None = None,
    spool: SpoolOptions | None = SPOOLED,
    distributed: bool | ProcessGroup | None = None,
) -> Session:
    """Connect a training run to Tamiyo. Never waits, and never fails for a server that is not there.

    Processes that train one model together, as under DistributedDataParallel, all connect, at the same place of the
    program; for that they wait for each other. Rank 0 then speaks for all; see :mod:`esperml.kasmina.distributed`.

    What it reports carries the W3C trace context in ``TRACEPARENT``, if the environment has one, and what is decided on
    it carries it on.

    Args:
        target: address of the server, for example ``localhost:50051``, or a link, such as
            :class:`~esperml.kasmina.FileLink`, which records a run without a server.
        model: a model that :func:`~esperml.kasmina.wrap` has wrapped; also one that ``torch.compile`` has compiled or
            that is under DistributedDataParallel since.
        optimizer: the optimizer that trains it.
        run: name of the run, 1 to 128 characters, unique on the server.
        scheduler: learning-rate scheduler, if there is one; it is extended when parameters join the optimizer.
        evaluate: gives the held-out loss of the model; called with the model in evaluation mode and without
            gradients, after which modes, buffers and random number generators are restored.
        mode: how far Tamiyo may go: ``observe`` records only, ``advise`` waits for approval, ``act`` acts.
        limits: what the run allows; no command can go beyond it. Absent fields are the server's defaults.
        policy: name of the policy that shall decide; empty for the server's default.
        paired_run: run of a twin that is left alone; see ``RunStarted.paired_run``.
        labels: anything that you want to find again.
        report_every: optimizer steps from one report to the next.
        evaluate_every: optimizer steps from one evaluation to the next, a multiple of ``report_every``; by default
            each report has one.
        overhead_ceiling: greatest share of the time that Esper may take, evaluation excluded. Where steps are too fast
            for it, reports measure fewer layers, in turn, and then become rarer than ``report_every``; the summary says
            how much was measured. A start-up of 0.1 s comes on top, and is paid back. ``None``: no ceiling, and the
            same reports every time.
        governor: how the run is guarded against changes that do harm; ``None``: not at all.
        credentials: token and TLS, where the server asks for them. Default: what ``ESPER_TOKEN``, ``ESPER_CA`` and the
            like say; see :meth:`~esperml.client.Credentials.from_environment`.
        spool: where events and outcomes that cannot be sent are kept for a later session; ``None``: nowhere.
        distributed: the processes that train this model together, as a group; ``True`` for all, ``False`` if this one
            trains it alone. Default: all, where ``torch.distributed`` is initialised.

    Raises:
        CredentialsError: those variables do not go together.
        KasminaError: the model is not wrapped, or nothing can join the optimizer though Tamiyo may act; parameters are
            sharded; ranks have not wrapped the same model, or ``torch.distributed`` is not initialised.
        ValueError: ``run``, ``mode``, ``report_every``, ``evaluate_every`` or ``overhead_ceiling`` is out of range.
    """
    if not 1 <= len(run) <= 128:
        raise ValueError(f"run must have 1 to 128 characters, not {len(run)}")
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, not {mode!r}")
    if report_every < 1:
        raise ValueError(f"report_every must be at least 1, not {report_every}")
    if evaluate_every is not None and (evaluate_every < 1 or evaluate_every % report_every):
        raise ValueError(f"evaluate_every must be a multiple of report_every ({report_every}), not {evaluate_every}")
    if overhead_ceiling is not None and not 0 < overhead_ceiling <= 1:
        raise ValueError(f"overhead_ceiling must be above 0 and at most 1, not {overhead_ceiling}")
    model = host_of(model).model
    closed = why_closed(optimizer)
    if closed and mode != "observe":
        raise KasminaError(f"{closed}; connect with mode='observe'")
    ranks = ranks_of(host_of(model), distributed)
    if ranks is not None:
        check_same(ranks, host_of(model), run=run, report_every=report_every)
    if ranks is not None and not ranks.leads:
        link: Link = LocalLink(lambda _kind, _event: [])
    elif isinstance(target, str):
        credentials = Credentials.from_environment() if credentials is None else credentials
        link = GrpcLink(target, run, credentials=credentials, spool=spool)
    else:
        link = target
    started = run_pb2.RunStarted(
        limits=limits,
        mode=_MODES[mode],
        policy=policy,
        paired_run=paired_run,
        labels=labels,
        client_version=client_version(),
    )
    session: Callable[..., Session] = Session if ranks is None else session_of(ranks)
    return session(
        link,
        model,
        optimizer,
        run=run,
        started=started,
        scheduler=scheduler,
        evaluate=evaluate,
        report_every=report_every,
        evaluate_every=evaluate_every or report_every,
        overhead_ceiling=overhead_ceiling,
        governor=governor,
    )
