import pytest

from benchmarks.exposition import by_label, parse, scrape, total

TEXT = """# HELP darkroom_requests_total Requests answered, by outcome
# TYPE darkroom_requests_total counter
darkroom_requests_total{model="stable_diffusion",outcome="image"} 12
darkroom_requests_total{model="stable_diffusion",outcome="invalid"} 3
darkroom_requests_total{model="sdxl",outcome="image"} 7
# TYPE darkroom_batch_rows histogram
darkroom_batch_rows_count{model="stable_diffusion"} 5
darkroom_batch_rows_sum{model="stable_diffusion"} 17.5
darkroom_batch_rows_bucket{model="stable_diffusion",le="+Inf"} 5
nv_inference_count{model="unet",version="1"} 1e+06
"""


def test_the_series_of_the_one_engine_are_found_by_their_label():
    series = parse(TEXT)

    assert by_label(series, "darkroom_requests_total", "outcome") == {"image": 12.0, "invalid": 3.0}
    assert by_label(series, "darkroom_images_total", "outcome") == {}


def test_a_metric_without_other_labels_has_one_value():
    series = parse(TEXT)

    assert total(series, "darkroom_batch_rows_sum") == 17.5
    assert series['nv_inference_count{model="unet",version="1"}'] == 1_000_000.0


def test_what_was_never_set_is_zero():
    assert total(parse(TEXT), "darkroom_running_pictures") == 0.0


def test_a_server_that_does_not_answer_is_an_oserror():
    with pytest.raises(OSError, match="refused"):
        scrape("http://127.0.0.1:1/metrics")
