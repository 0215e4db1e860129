"""``esper bench decide``, small."""

import json

import pytest
from click.testing import CliRunner

from esperml.bench.cli import as_table, bench
from esperml.bench.hosts import chain
from esperml.tamiyo.validate import check_state


def keys(found, prefix=""):
    for name, value in found.items():
        yield prefix + name
        if name == "results":
            yield from keys(value[0], "results[].")


@pytest.mark.parametrize("layers", [1, 10, 64, 256])
def test_the_hosts_that_are_measured_are_good_states(layers):
    check_state(chain(layers))


def test_the_help_documents_every_key_of_the_json_output():
    found = CliRunner().invoke(bench, ["decide", "--json", "--layers", "3", "--calls", "3"])
    assert found.exit_code == 0, found.output
    measured = json.loads(found.output)
    text = CliRunner().invoke(bench, ["decide", "--help"]).output
    assert [key for key in keys(measured) if f"{key} " not in text] == ["results"]
    row = measured["results"][0]
    assert row["layers"] == 3
    assert row["decide_ms"]["p99"] >= row["decide_ms"]["p50"] > row["engine_ms"]["p50"] > 0
    table = as_table(measured).splitlines()
    assert table[0].split()[0] == "layers"
    assert table[1].split()[0] == "3"
    assert row["ratio"]["p50"] == pytest.approx(row["decide_ms"]["p50"] / row["noop_ms"]["p50"], rel=0.05)


def test_a_server_that_does_not_start_is_reported_with_what_it_wrote(tmp_path):
    found = CliRunner().invoke(bench, ["decide", "--policy", str(tmp_path)])
    assert found.exit_code == 1
    assert "did not start" in found.output
    assert "checkpoint" in found.output
