import pytest

from winnow.common.figures import brief, count_of, human_bytes, human_figure, human_hours, human_rate


@pytest.mark.parametrize(
    ("count", "text"),
    [(10, "10 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**51, "2048.0 TiB")],
)
def test_bytes_have_the_largest_fitting_unit(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(("rate", "text"), [(0.345, "0.34"), (9.96, "10"), (1204.4, "1,204")])
def test_a_small_rate_keeps_two_digits(rate, text):
    assert human_rate(rate) == text


def test_one_thing_is_no_plural():
    assert [count_of(count, "unit") for count in (0, 1, 2, 1204)] == [
        "0 units",
        "1 unit",
        "2 units",
        "1,204 units",
    ]


def test_hours_are_shown_in_the_largest_unit_that_fits():
    shown = [human_hours(hours) for hours in (60, 3.2, 0.5, 0.005, 1e-5, 0)]
    assert shown == ["2.5 days", "3.2 h", "30.0 min", "18 s", "under 1 s", "0 s"]


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (0.25784, "0.2578"),
        (32.0, "32"),
        (0.0, "0"),
        (999.96, "1000"),
        (63_488.0, "63,488"),
        (-1.43e6, "-1,430,000"),
    ],
)
def test_a_figure_has_four_digits_and_a_count_all(figure, text):
    assert human_figure(figure) == text


@pytest.mark.parametrize(
    ("text", "most", "shown"),
    [
        ("It  failed.\n", 40, "It failed"),
        ("It failed. Lease ID: 06. Some causes", 28, "It failed. Lease ID: 06"),
        ("a sentence that is longer than the line", 26, "a sentence that is [...]"),
    ],
)
def test_a_long_cause_ends_with_a_sentence_or_says_that_it_was_cut(text, most, shown):
    assert brief(text, most) == shown
    assert len(brief(text, most)) <= most
