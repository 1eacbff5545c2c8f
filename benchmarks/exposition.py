"""The server's metrics, in Prometheus' text format."""

import re
import urllib.request
from collections.abc import Mapping

_LINE = re.compile(r"^(?P<series>[a-zA-Z_:][\w:]*(\{.*\})?) (?P<value>\S+)( \d+)?$")

Series = Mapping[str, float]
"""Values by name and labels, as the text has them: `darkroom_requests_total{outcome="image"}`."""


def scrape(url: str, timeout: float = 10.0) -> Series:
    """The metrics that a server tells now.

    Raises:
        OSError: it does not answer.
    """
    with urllib.request.urlopen(url, timeout=timeout) as answer:  # noqa: S310  our own server
        return parse(answer.read().decode())


def parse(text: str) -> Series:
    matches = map(_LINE.match, text.splitlines())
    return {match["series"]: float(match["value"]) for match in matches if match}


def by_label(series: Series, name: str, label: str) -> dict[str, float]:
    """The values of a metric by its one label."""
    pattern = re.compile(rf'{name}\{{{label}="(.*)"\}}')
    matches = {pattern.fullmatch(key): value for key, value in series.items()}
    return {match[1]: value for match, value in matches.items() if match}


def total(series: Series, name: str) -> float:
    """The value of a metric without labels; 0 if it was never set."""
    return series.get(name, 0.0)
