"""Violations: counted always, logged rarely."""

from structlog.testing import capture_logs

from zml.transport.violations import LINES, Violations


def test_each_is_counted_and_one_in_ten_seconds_is_logged_per_rule_and_peer() -> None:
    violations = Violations()
    with capture_logs() as logs:
        for millisecond in range(0, 25_000, 10):
            violations.note("magic", "w0", "begins with PICK", millisecond / 1000)
        violations.note("magic", "w1", "begins with PICK", 25.0)
        violations.note("window", "w0", "request 0", 25.0)
    assert violations.counts == {"magic": 2501, "window": 1}
    assert [(entry["rule"], entry["peer"], entry.get("left_out")) for entry in logs] == [
        ("magic", "w0", None),
        ("magic", "w0", 999),
        ("magic", "w0", 999),
        ("magic", "w1", None),
        ("window", "w0", None),
    ]


def test_a_million_names_do_not_fill_the_log() -> None:
    violations = Violations()
    with capture_logs() as logs:
        for number in range(20_000):
            violations.note("identity", f"m{number}", "is somebody else", number / 1000)
    assert violations.counts == {"identity": 20_000}
    assert len(logs) == 2 * LINES + 1
    assert logs[LINES]["event"] == "refused more than is logged" and logs[LINES]["times"] == 10_000 - LINES
    assert len(violations._logged) <= 1024
