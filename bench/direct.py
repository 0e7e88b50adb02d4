"""HTTP questions to servers under test, asked directly whatever the environment says of proxies.

The load itself goes without a proxy, which would be measured as latency; and a proxy knows nothing of this
machine's loopback, where our servers are.
"""

import urllib.request
from typing import Any

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def open_url(url: str, timeout_s: float) -> Any:
    """The response to a GET of ``url``, as :func:`urllib.request.urlopen` gives it, with the same errors."""
    return _OPENER.open(url, timeout=timeout_s)
