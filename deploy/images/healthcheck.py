"""Exit 0 when the server in this container answers /health; PORT and TLS follow the server's own settings."""

import os
import ssl
import sys
import urllib.error
import urllib.request

SCHEME = "https" if os.environ.get("HEALTH_TLS") == "1" else "http"
URL = f"{SCHEME}://127.0.0.1:{os.environ.get('PORT', '8000')}/health"


def main() -> int:
    """Ask once; the certificate is for the outside name, so it is not checked on loopback.

    A proxy, which Docker's client may set for every container, cannot reach this loopback.
    """
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if SCHEME == "https":
        handlers.append(urllib.request.HTTPSHandler(context=ssl._create_unverified_context()))  # noqa: S323
    try:
        with urllib.request.build_opener(*handlers).open(URL, timeout=4) as answer:
            return 0 if answer.status == 200 else 1
    except (urllib.error.URLError, OSError) as error:
        sys.stderr.write(f"{URL}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
