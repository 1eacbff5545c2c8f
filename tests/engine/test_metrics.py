"""The metrics' names, by Prometheus' conventions."""

import re

import pytest

from darkroom_engine.metrics import METRICS, Kind, Metric, record_nothing, rows_label


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_name_tells_what_is_counted_and_in_which_unit(metric: Metric) -> None:
    assert re.fullmatch(r"darkroom(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert not metric.name.endswith(("_count", "_sum", "_bucket", "_ms", "_us"))
    assert metric.description[0].isupper()
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert list(metric.buckets) == sorted(set(metric.buckets))


def test_no_name_is_given_twice() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_rows_are_told_apart_by_powers_of_two() -> None:
    labels = [rows_label(n) for n in (1, 2, 3, 4, 5, 16, 17, 33, 63, 100)]

    assert labels == ["1", "2", "4", "4", "8", "16", "32", "63", "63", "100"]


def test_an_engine_may_be_watched_by_nobody() -> None:
    record_nothing(METRICS[0], 1.0)
