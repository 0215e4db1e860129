import math

from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from esperml.v1 import event_pb2, health_pb2, run_pb2, runs_pb2

NOW = Timestamp(seconds=5)
TELEMETRY, EVENTS, OUTCOMES = event_pb2.KIND_TELEMETRY, event_pb2.KIND_EVENTS, event_pb2.KIND_OUTCOMES


def play(tools, path, **settings):
    host = tools.Host(tools.controller(path, **settings))
    outgoing = list(host.start())
    for step in range(100, 1500, 100):
        answers = host.report(step, held_out_loss=1.0)
        outgoing += answers
        for command in tools.told(answers).commands:
            outgoing += host.answer(command, step=step + 1)
    outgoing += host.end(1500)
    return host, [event.SerializeToString(deterministic=True) for _, event in outgoing]


def test_the_same_events_give_the_same_answers(tools, tmp_path):
    assert play(tools, tmp_path)[1] == play(tools, tmp_path)[1]
    assert play(tools, tmp_path)[1] != play(tools, tmp_path, random_seed=8)[1]


@settings(max_examples=12, deadline=None)
@given(crash=st.integers(1, 12))
def test_a_controller_rebuilt_from_the_record_goes_on_as_if_nothing_had_been(tools, tmp_path_factory, crash):
    path = tmp_path_factory.mktemp("policies")
    host = tools.Host(tools.controller(path))
    record, after = [], []
    host.start()
    for step in range(100, 1300, 100):
        answers = host.report(step)
        if step > 100 * crash:
            after += answers
        else:
            record += [item for item in answers if item[0] == event_pb2.KIND_DECISIONS]
        for command in tools.told(answers).commands:
            host.answer(command, step=step + 1)
    split = next(
        (
            index
            for index, (_, event) in enumerate(host.said)
            if event.HasField("health_report") and event.health_report.step > 100 * crash
        ),
        len(host.said),
    )
    rebuilt = tools.controller(path)
    rebuilt.rebuild(host.said[:split] + record)
    again = [item for kind, event in host.said[split:] for item in rebuilt.handle(kind, event)]
    assert again == after


def test_rebuilding_decides_nothing_that_was_not_decided_then(tools, host, tmp_path):
    host.report(100)
    host.report(200)
    rebuilt = tools.controller(tmp_path)
    rebuilt.rebuild(host.said)
    assert rebuilt.run("run").decisions == 0
    assert rebuilt.run("run").step == 200


def test_a_report_that_comes_again_after_rebuilding_is_not_decided_on_anew(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path, random_seed=None))
    host.start()
    first = host.report(100)
    rebuilt = tools.controller(tmp_path, random_seed=None)
    rebuilt.rebuild([host.said[0], first[0]])
    assert rebuilt.handle(*host.said[1]) == first


def test_rebuilding_leaves_out_what_is_malformed(tools, host, tmp_path):
    bad = host.event(run_ended=run_pb2.RunEnded(run=health_pb2.RunMeasures(train_loss=math.nan)))
    rebuilt = tools.controller(tmp_path)
    rebuilt.rebuild([*host.said, (EVENTS, bad)])
    assert rebuilt.run("run").status == runs_pb2.RUN_STATUS_RUNNING
