import pytest

from benchmarks.ledger import disagreements, growth


def test_equal_counts_agree():
    assert disagreements({"image": 5, "invalid": 1}, {"image": 5.0, "invalid": 1.0}) == []


def test_what_the_client_closed_may_be_cancelled_or_a_picture():
    client = {"image": 5, "cancelled": 1, "closed": 3}

    assert disagreements(client, {"image": 6.0, "cancelled": 3.0}) == []


@pytest.mark.parametrize(
    ("server", "message"),
    [
        pytest.param(
            {"image": 4.0, "cancelled": 3.0, "invalid": 1.0},
            "image: clients saw 5, the server counted 4",
            id="a picture that it knows nothing of",
        ),
        pytest.param(
            {"image": 5.0, "cancelled": 1.0, "invalid": 2.0},
            "invalid: clients saw 1, the server counted 2",
            id="one more invalid",
        ),
        pytest.param(
            {"image": 5.0, "cancelled": 1.0, "invalid": 1.0},
            "8 requests were sent, 7 answered",
            id="a closed one that was never answered",
        ),
        pytest.param(
            {"image": 6.0, "cancelled": 2.0, "invalid": 1.0},
            "8 requests were sent, 9 answered",
            id="one answered twice",
        ),
        pytest.param(
            {"image": 5.0, "cancelled": 1.0, "invalid": 1.0, "error": 1.0},
            "error: clients saw 0, the server counted 1",
            id="an error that no client saw",
        ),
    ],
)
def test_each_disagreement_is_told(server, message):
    assert message in disagreements({"image": 5, "invalid": 1, "closed": 2}, server)


def test_what_grows_at_first_and_then_stays_has_no_growth():
    result = growth(range(0, 1100, 100), [10, 60, 90, *[100] * 8])

    assert result == {"at_quarter": 100.0, "at_end": 100.0, "growth": 0.0, "per_1000": 0.0}


def test_a_leak_shows_in_the_growth_for_a_thousand_requests():
    done = range(0, 2001, 20)

    result = growth(done, [500 + number / 4 for number in done])

    assert result["per_1000"] == 250.0
    assert result["growth"] == pytest.approx(375.0, rel=0.1)


def test_one_sample_does_not_grow():
    assert growth([0], [10.0])["growth"] == 0.0
    assert growth([0], [10.0])["per_1000"] == 0.0
