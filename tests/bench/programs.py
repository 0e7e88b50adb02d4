"""Programs outside Python that some tests need; `.ci/run` installs them, so there none may be missing."""

import os
import shutil

import pytest

PACKAGES = {"chromium": "chromium", "prometheus-pushgateway": "prometheus-pushgateway"}


def need(program: str) -> str:
    """Its path; skips the test without it, and fails it in continuous integration."""
    found = shutil.which(program)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"no {program} here, although .ci/run installs it")
    if found is None:
        pytest.skip(f"no {program} here (Debian: apt-get install {PACKAGES[program]})")
    return found
