from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.config.fields import Duration


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("20ep", 20, "ep"),
        ("20 ep", 20, "ep"),
        (" 3ep ", 3, "ep"),
        ("500step", 500, "step"),
        ("1e3step", 1000, "step"),
        ("10min", 600, "s"),
        ("1.5h", 5400, "s"),
        ("0.25s", 0.25, "s"),
    ],
)
def test_a_number_and_its_unit_are_read(text: str, value: float, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)


@pytest.mark.parametrize(
    "text", ["20", 20, "", "ep", "3 epochs", "0ep", "-1ep", "1.5ep", "0.5step", "3days", "1.2.3s", True, None, "inf s"]
)
def test_anything_else_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Duration.parse(text)


def test_a_bare_number_is_answered_with_the_units() -> None:
    with pytest.raises(
        ValueError, match=r"20 has no unit; .*ep \(epochs\), step \(optimizer steps\), s, min or h.*20ep"
    ):
        Duration.parse(20)


def test_epochs_and_steps_are_ints_and_time_is_in_seconds() -> None:
    assert type(Duration.parse("20ep").value) is int
    assert type(Duration.parse("20step").value) is int
    assert Duration.parse("2min").is_time
    assert not Duration.parse("2ep").is_time


@settings(deadline=None)
@given(
    st.one_of(
        st.builds(Duration, st.integers(1, 10**12), st.sampled_from(["ep", "step"])),
        st.builds(Duration, st.floats(min_value=1e-6, max_value=1e12), st.just("s")),
        st.builds(Duration, st.integers(1, 10**6), st.just("s")),
    )
)
def test_what_it_prints_reads_back_equal(duration: Duration) -> None:
    assert Duration.parse(str(duration)) == duration


def test_it_prints_the_largest_unit_that_fits() -> None:
    assert [str(Duration.parse(text)) for text in ("120min", "90min", "61s", "3ep")] == ["2h", "90min", "61s", "3ep"]
