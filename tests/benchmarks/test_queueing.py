from benchmarks.queueing import Arrival, first_come_first_served


def test_who_finds_a_free_row_starts_at_once():
    arrivals = [Arrival(0.0, 100), Arrival(0.25, 100)]

    assert first_come_first_served(arrivals, max_rows=2, step_s=0.01) == [0.0, 0.25]


def test_a_short_request_waits_until_a_long_one_ends():
    arrivals = [Arrival(0.0, 100), Arrival(0.5, 200), Arrival(0.75, 4)]

    starts = first_come_first_served(arrivals, max_rows=2, step_s=0.01)

    assert starts == [0.0, 0.5, 1.0]


def test_requests_start_in_the_order_in_which_they_came():
    arrivals = [Arrival(0.3, 1), Arrival(0.0, 100), Arrival(0.1, 50)]

    starts = first_come_first_served(arrivals, max_rows=1, step_s=0.01)

    assert starts == [1.5, 0.0, 1.0]
