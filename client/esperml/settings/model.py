"""The settings themselves. A field's description is its documentation: ``esper config show`` prints it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A group of settings. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(Section):
    """The server process."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(50051, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data_dir: Path = Field(Path("esper-data"), description="Folder of the bus's logs.")
    certificate: Path | None = Field(
        None, description="Certificate chain of the server (PEM); with a key, it uses TLS."
    )
    key: Path | None = Field(None, description="Private key of the certificate (PEM).")
    client_ca: Path | None = Field(
        None, description="Authorities of clients' certificates (PEM); with it, a client must have one (mutual TLS)."
    )
    tokens: Path | None = Field(
        None, description="File of tokens, which `esper token` writes; with it, every call needs one of them."
    )
    insecure: bool = Field(False, description="Allow an address beyond loopback without TLS and tokens.")
    metrics_host: str = Field("127.0.0.1", description="Address of the metrics. Beyond loopback only with insecure.")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="Port at which Prometheus finds metrics; 0 takes a free one. Absent: none."
    )
    handshake_timeout_s: float = Field(10.0, gt=0, description="Time in which a connection must be set up, in s.")
    idle_timeout_s: float = Field(
        300.0, gt=0, description="Time after which a connection without calls is closed, in s."
    )
    shutdown_grace_s: float = Field(5.0, ge=0, description="Time that open calls get when the server stops, in s.")


class RetentionLimits(Section):
    """What the log of one kind keeps. Its oldest records leave as soon as any of the limits is passed."""

    age_s: float = Field(0, ge=0, description="Longest time since a record was stored, in s. 0: for ever.")
    bytes: int = Field(0, ge=0, description="Most bytes of the records. 0: no limit.")
    records: int = Field(0, ge=0, description="Most records. 0: no limit.")


class RetentionSettings(Section):
    """What the bus keeps, per kind.

    Telemetry is by far the most of what is stored, and worth least once a decision was made on it. The rest is small
    and is what nothing can make anew: what runs there were and of what shape, what was decided and why, what came of
    it, and the experience to learn from. It stays until somebody purges it.
    """

    telemetry: RetentionLimits = RetentionLimits(age_s=30 * 86_400, bytes=8 * 2**30)
    events: RetentionLimits = RetentionLimits()
    decisions: RetentionLimits = RetentionLimits()
    commands: RetentionLimits = RetentionLimits()
    outcomes: RetentionLimits = RetentionLimits()
    experience: RetentionLimits = RetentionLimits()


class JetStreamSettings(Section):
    """The NATS cluster that holds the log, where ``oona.engine`` is ``jetstream``."""

    servers: str = Field("nats://127.0.0.1:4222", min_length=1, description="Its servers, separated by commas.")
    credentials_file: Path | None = Field(None, description="File of credentials for it. Absent: none.")
    tls_ca_file: Path | None = Field(
        None, description="Certificates of those who vouch for its servers, in PEM. Absent: no TLS unless they ask."
    )
    prefix: str = Field(
        "oona", pattern="^[a-z][a-z0-9-]*$", description="What the names of streams and subjects begin with."
    )
    replicas: int = Field(
        0,
        ge=0,
        le=5,
        description="Servers that hold each stream. 0: three in a cluster, one where there is one server.",
    )
    monitoring: str = Field(
        "",
        description="Monitoring addresses of its servers, for example http://127.0.0.1:8222, separated by commas. They "
        "are asked whether they sync before they confirm. Empty: the declared durability leaves that open.",
    )
    timeout_s: float = Field(10.0, ge=1, description="Time after which what the cluster has not confirmed fails, in s.")
    lease_s: float = Field(
        5.0, ge=1, description="Time after which the groups of a server that is silent go to another, in s."
    )


class RedeliverySettings(Section):
    """What becomes of records that a member of a group gave back, or held for too long, unless it asks otherwise."""

    max_attempts: int = Field(10, ge=1, le=1000, description="Deliveries of a record before it becomes a dead letter.")
    min_delay_s: float = Field(
        0.1, ge=0, le=86_400, description="Time before the second delivery, in s; each further time twice as long."
    )
    max_delay_s: float = Field(60.0, ge=0, le=86_400, description="Longest time before a delivery, in s.")


class OonaSettings(Section):
    """The bus."""

    engine: Literal["sqlite", "jetstream"] = Field(
        "sqlite", description="What holds the log. sqlite: a file. jetstream: a NATS cluster, for several servers."
    )
    durability: Literal["fsync", "page_cache"] = Field(
        "fsync",
        description="What a confirmed record survives. fsync: loss of power. page_cache: the end of the server's "
        "process, but not that of the machine; faster.",
    )

    max_frame_bytes: int = Field(16 * 2**20, ge=2**16, le=2**29, description="Most bytes that a frame may have.")
    max_streams: int = Field(1024, ge=1, description="Streams that may be open at the same time.")
    max_streams_per_token: int = Field(256, ge=1, description="Streams that the holders of one token may have open.")
    max_subscriptions: int = Field(256, ge=1, description="Subscriptions that one stream may have.")
    publish_events_per_s: float = Field(
        0,
        ge=0,
        description="Events that one token, or one client where there are none, may publish per s. 0: no limit.",
    )
    publish_bytes_per_s: float = Field(
        0,
        ge=0,
        description="Bytes of events that one token, or one client where there are none, may publish per s. "
        "0: no limit.",
    )
    ack_deadline_s: float = Field(
        30.0, gt=0, description="Time after which an unacknowledged record comes again, in s."
    )
    delivery_records: int = Field(256, ge=1, description="Most records in one delivery.")
    max_log_bytes: int = Field(
        0,
        ge=0,
        description="Most bytes of the log file; beyond them nothing is stored until a purge. 0: no limit but "
        "the disk's, and on a full disk a purge has no room to work.",
    )
    cache_bytes: int = Field(64 * 2**20, ge=0, description="Bytes of recent frames kept decoded for readers.")
    retention: RetentionSettings = RetentionSettings()
    redelivery: RedeliverySettings = RedeliverySettings()
    jetstream: JetStreamSettings = JetStreamSettings()


class TamiyoSettings(Section):
    """The controller. The limits are those of runs that do not state their own."""

    enabled: bool = Field(True, description="Whether to decide here. Of the servers of a cluster, one does.")
    policy: str = Field(
        "shipped", description="Policy that decides: a name that the server knows, or a checkpoint's path."
    )
    policy_dir: Path = Field(Path("policies"), description="Folder from which checkpoints may be promoted.")
    sample: bool = Field(False, description="Draw decisions from the policy's distribution, not the most probable.")
    random_seed: int | None = Field(None, ge=0, description="Seed of all draws. Absent: not reproducible.")
    threads: int = Field(1, ge=1, description="Threads that torch may use.")
    health_threshold: float = Field(1.0, ge=0, le=1, description="Layers healthier than this are not adapted.")
    confidence_threshold: float = Field(0.5, ge=0, le=1, description="Adaptations less probable are held back.")
    cull_below: float = Field(
        0.005, description="Relative loss increase on ablation at which a seed is kept; less culls it."
    )
    command_ttl_steps: int = Field(1000, ge=0, description="Steps after which a command expires; 0 means never.")
    parameter_budget_fraction: float = Field(
        0.5, gt=0, description="Parameters that all seeds may have together, relative to the host's."
    )
    graft_parameter_budget_fraction: float = Field(
        0.25, gt=0, description="Parameters that one graft may have, relative to the host's."
    )
    max_live_seeds: int = Field(2, ge=1, description="Seeds that may live at the same time, fossils not counted.")
    warmup_steps: int = Field(200, ge=0, description="Steps before the first adaptation.")
    decision_interval_steps: int = Field(100, ge=1, description="Steps between two decisions.")
    blend_steps: int = Field(50, ge=0, description="Steps over which a new seed's alpha rises from 0 to 1.")
    hold_steps: int = Field(200, ge=0, description="Steps that a seed holds before it is fossilised or culled.")
    embargo_steps: int = Field(500, ge=0, description="Steps that a place rests after a cull or a refusal.")
    parameter_price: float = Field(0.02, ge=0, description="Cost in the reward of growing by the host's own size.")
    max_runs: int = Field(
        256,
        ge=1,
        description="Runs followed at a time. Where there are as many, ended ones make room, then the idle; no others.",
    )
    idle_run_s: float = Field(
        600.0, gt=0, description="Time without a word, in s, after which a run makes room for another."
    )


class LogSettings(Section):
    """The program's own log."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is written.")
    format: Literal["console", "json"] = Field("console", description="For people, or for machines.")


class Settings(Section):
    """All of them."""

    server: ServerSettings = ServerSettings()
    oona: OonaSettings = OonaSettings()
    tamiyo: TamiyoSettings = TamiyoSettings()
    log: LogSettings = LogSettings()
