"""A check tells passed, not yet and not attempted apart, and leaves its record, in a real kernel's display system."""

import pytest

from course_lib import checks


@pytest.fixture
def shown(monkeypatch):
    """What would be displayed, as MIME bundles."""
    bundles = []
    monkeypatch.setattr(checks, "_display", bundles.append)
    monkeypatch.delenv("COURSE_STRICT", raising=False)
    checks.begin("", "")
    checks.begin("week00/00_test", "abc")
    return bundles


def records(bundles):
    return [bundle[checks.CHECK_MIME] for bundle in bundles if checks.CHECK_MIME in bundle]


def test_a_passed_check_earns_its_points(shown):
    with checks.check("1.1", points=3):
        assert True
    (record,) = records(shown)
    assert (record["status"], record["earned"], record["points"], record["passed"]) == ("passed", 3, 3, True)
    assert (record["lesson"], record["version"], record["sequence"]) == ("week00/00_test", "abc", 1)


def test_a_failed_assert_shows_its_message_and_lets_the_notebook_go_on(shown):
    with checks.check("1.1", points=3):
        raise AssertionError("look at the scale")
    assert records(shown)[0]["status"] == "not yet"
    assert records(shown)[0]["message"] == "look at the scale"


def test_a_stub_counts_as_not_attempted(shown):
    def stub():
        raise NotImplementedError("replace this line")

    with checks.check("1.1", points=1):
        stub()
    with checks.check("1.2", points=1, answers=(...,)):
        assert ... == 4
    with checks.check("1.3", points=1):
        never_defined  # noqa: B018, F821
    assert [record["status"] for record in records(shown)] == ["not attempted"] * 3
    assert "never_defined" in records(shown)[2]["message"]


def test_a_misspelt_name_in_the_students_function_is_their_error_and_not_an_exercise_left_out(shown):
    def student():
        return hits / totl  # noqa: F821

    hits = 3
    with checks.check("1.1", points=1):
        student()
    assert records(shown)[0]["status"] == "not yet"
    assert "'totl'" in records(shown)[0]["message"]


def test_a_forgotten_return_is_named(shown):
    def student():
        pass

    with checks.check("1.1", points=1):
        assert student().shape == (1, 2)
    assert "is a `return` missing?" in records(shown)[0]["message"]


def test_the_report_lists_what_was_never_checked_in_order_with_open_questions_last(shown):
    checks.begin("week00/00_test", "abc", {"1.1": 2, "1.2": 4, "1.10": 3})
    checks.open_question("1.1", "Five words and one more.")
    with checks.check("1.10", points=3):
        pass
    checks.report()
    data = shown[-1]["application/vnd.course.report+json"]
    assert [result["exercise"] for result in data["results"]] == ["1.2", "1.10", "1.1"]
    assert (data["earned"], data["possible"]) == (3, 7)


def test_running_the_set_up_again_loses_nothing_and_another_version_starts_afresh(shown):
    with checks.check("1.1", points=3):
        pass
    checks.begin("week00/00_test", "abc")
    checks.report()
    assert shown[-1]["application/vnd.course.report+json"]["earned"] == 3
    checks.begin("week00/00_test", "abcd")
    checks.report()
    assert shown[-1]["application/vnd.course.report+json"]["earned"] == 0


def test_an_exception_in_the_students_code_names_its_kind_and_line(shown):
    def student():
        return {}["missing"]

    with checks.check("1.1", points=1):
        student()
    message = records(shown)[0]["message"]
    assert "KeyError" in message and 'return {}["missing"]' in message


def test_a_message_is_escaped_and_kept_short(shown):
    with checks.check("1.1", points=1):
        raise AssertionError("<script>alert(1)</script>" + "x" * 1000)
    assert "<script>" not in shown[0]["text/html"]
    assert len(records(shown)[0]["message"]) == 300


def test_strict_mode_raises_for_everything_but_a_pass(shown, monkeypatch):
    monkeypatch.setenv("COURSE_STRICT", "1")
    with checks.check("1.1", points=1):
        pass
    with pytest.raises(AssertionError, match="scale"), checks.check("1.2", points=1):
        raise AssertionError("look at the scale")
    with pytest.raises(AssertionError, match=r"check 1\.3"), checks.check("1.3", points=1, answers=(...,)):
        pass


def test_an_interrupt_is_not_swallowed(shown):
    with pytest.raises(KeyboardInterrupt), checks.check("1.1", points=1):
        raise KeyboardInterrupt


def test_the_report_adds_up_and_leaves_open_questions_to_a_person(shown):
    with checks.check("1.1", points=2):
        pass
    with checks.check("1.2", points=3):
        raise AssertionError("no")
    with checks.check("1.2", points=3):
        pass  # a second, better try counts
    checks.open_question("1.3", "Because the encoder reads both ways at once.", points=4)
    checks.report()
    data = shown[-1]["application/vnd.course.report+json"]
    assert (data["earned"], data["possible"]) == (5, 5)
    assert [result["exercise"] for result in data["results"]] == ["1.1", "1.2", "1.3"]
    assert "for your instructor" in shown[-1]["text/html"]


def test_a_failed_retry_takes_the_points_back(shown):
    with checks.check("1.1", points=2):
        pass
    with checks.check("1.1", points=2):
        raise AssertionError("broken again")
    checks.report()
    assert shown[-1]["application/vnd.course.report+json"]["earned"] == 0


def test_an_open_question_needs_a_few_words(shown):
    checks.open_question("1.7", ...)
    checks.open_question("1.7", "yes")
    checks.open_question("1.7", "Because labels are dear and text is cheap.")
    statuses = [record["status"] for record in records(shown)]
    assert statuses == ["not attempted", "not attempted", "for your instructor"]
    assert records(shown)[2]["answer"].startswith("Because")


def test_recorded_values_travel_in_the_output_and_into_later_checks(shown):
    checks.record("profile", "tiny")
    checks.record("device", "CPU, 2 cores")
    checks.record("after", 0.875)
    with checks.check("1.1", points=1):
        pass
    assert shown[2][checks.RECORD_MIME] == {
        "lesson": "week00/00_test",
        "version": "abc",
        "name": "after",
        "value": 0.875,
    }
    assert (records(shown)[0]["profile"], records(shown)[0]["device"]) == ("tiny", "CPU, 2 cores")


def test_in_a_kernel_the_record_carries_the_hash_of_the_exercise_cell():
    import hashlib

    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell.instance()
    try:
        cell = "# Exercise 9.1\ndef f():\n    return 1"
        shell.run_cell(cell, store_history=True)
        with capture_output() as captured:
            shell.run_cell(
                "from course_lib.checks import begin, check\nbegin('l', 'v')\nwith check('9.1', points=1):\n    assert f() == 1",
                store_history=True,
            )
        record = captured.outputs[-1].data[checks.CHECK_MIME]
        assert record["cell_hash"] == hashlib.sha256(cell.encode()).hexdigest()[:16]
        assert "check 9.1: passed" in captured.outputs[-1].data["text/plain"]
    finally:
        InteractiveShell.clear_instance()
