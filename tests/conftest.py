"""Shared by all tests."""

import platform
from importlib import metadata

REPORTED = ("numpy", "torch", "diffusers", "transformers", "onnxruntime", "tritonclient")


def pytest_report_header() -> str:
    versions = [f"python {platform.python_version()}"]
    for package in REPORTED:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return ", ".join(versions)
