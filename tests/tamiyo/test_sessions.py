"""Two sessions under one run."""

import pytest

from esperml.tamiyo.sessions import MAX_SUPERSEDED, stale_reports
from esperml.v1 import event_pb2, run_pb2


@pytest.fixture
def pair(tools, tmp_path):
    """A session that reports, and another that has begun under the same name while it does."""
    controller = tools.controller(tmp_path)
    first = tools.Host(controller, session_id="first")
    second = tools.Host(controller, session_id="second", clock=2_000)
    first.start()
    first.report(100)
    second.start()
    return first, second


def notices(outgoing):
    return {
        event.session_id: event.notice.code
        for kind, event in outgoing
        if kind == event_pb2.KIND_COMMANDS and event.HasField("notice")
    }


def test_both_are_told_once_when_the_older_one_still_reports(pair):
    first, second = pair
    first.clock = 3_000
    outgoing = first.report(300)
    assert notices(outgoing) == {
        "first": run_pb2.NOTICE_CODE_SUPERSEDED,
        "second": run_pb2.NOTICE_CODE_CONTENDED,
    }
    assert all("'run'" in event.notice.text for _, event in outgoing)
    assert len({event.event_id for _, event in outgoing}) == 2
    assert first.report(400) == []
    assert second.controller.run("run").step == 0


def test_nothing_that_the_older_one_says_is_taken_in(tools, pair):
    first, second = pair
    first.clock = 3_000
    first.report(900, held_out_loss=5.0)
    told = tools.told(second.report(100))
    assert [decision.step for decision in told.decisions] == [100]
    assert not second.controller.state("run").run.HasField("held_out_loss")
    first.end(1000)
    assert tools.told(second.report(200)).decisions
    step, answers = tools.until_command(second, range(300, 5000, 100))
    first.answer(answers.commands[0], step=step)
    assert second.controller.run("run").applied == 0


def test_a_restart_is_no_quarrel(pair):
    first, second = pair
    first.clock = 1_500
    assert first.report(200) == []
    first.clock = 3_000
    assert first.end(210) == []
    assert second.report(20) == []


def test_an_older_start_that_comes_again_changes_nothing(pair):
    first, second = pair
    second.report(100)
    assert first.start() == []
    assert second.controller.run("run").step == 100


def test_what_a_session_says_before_its_start_is_known_waits_for_it(tools, pair):
    _, second = pair
    third = tools.Host(second.controller, session_id="third", clock=4_000)
    assert third.report(100) == []
    assert second.controller.run("run").step == 0
    assert [decision.step for decision in tools.told(third.start()).decisions] == [100]


def test_events_without_a_session_are_the_present_ones(tools, pair):
    _, second = pair
    anyone = tools.Host(second.controller)
    assert tools.told(anyone.report(100)).decisions


def test_a_start_without_a_session_supersedes_as_well(tools, pair):
    _, second = pair
    anyone = tools.Host(second.controller, clock=4_000)
    anyone.start()
    assert second.report(100) == []
    second.clock = 5_000
    assert notices(second.report(200)) == {
        "second": run_pb2.NOTICE_CODE_SUPERSEDED,
        "": run_pb2.NOTICE_CODE_CONTENDED,
    }


def test_what_tamiyo_says_names_the_session(tools, pair):
    _, second = pair
    outgoing = [item for step in range(100, 1500, 100) for item in second.report(step)]
    assert {event.session_id for _, event in outgoing} == {"second"}


def test_rebuilding_comes_to_the_same(tools, tmp_path, pair):
    first, second = pair
    first.clock = 3_000
    first.report(300)
    second.clock = 3_500
    second.report(50)
    rebuilt = tools.controller(tmp_path)
    rebuilt.rebuild([*first.said, *second.said])
    assert rebuilt.run("run") == second.controller.run("run")


def test_an_older_session_that_lives_on_is_told_after_rebuilding_whoever_was_told_before(tools, tmp_path, pair):
    first, second = pair
    first.clock = 3_000
    first.report(300)
    rebuilt = tools.controller(tmp_path)
    rebuilt.rebuild([*first.said, *second.said])
    first.controller = rebuilt
    assert notices(first.report(400)) == {
        "first": run_pb2.NOTICE_CODE_SUPERSEDED,
        "second": run_pb2.NOTICE_CODE_CONTENDED,
    }
    assert first.report(500) == []


def test_only_so_many_earlier_sessions_are_remembered(tools, tmp_path):
    controller = tools.controller(tmp_path)
    for index in range(MAX_SUPERSEDED + 10):
        tools.Host(controller, session_id=f"s{index}", clock=1_000 * index).start()
    assert len(controller._runs["run"].run.superseded) == MAX_SUPERSEDED
    assert "s72" in controller._runs["run"].run.superseded


def test_reports_are_stale_where_a_later_one_of_their_session_follows(tools):
    first, second = (tools.Host(None, session_id=name) for name in ("first", "second"))
    graph = tools.graph()
    events = [
        first.event(health_report=tools.report(graph, 10)),
        second.event(health_report=tools.report(graph, 10)),
        first.event(run_ended=run_pb2.RunEnded()),
        first.event(health_report=tools.report(graph, 20)),
    ]
    assert stale_reports(events) == [True, False, False, False]
