"""A web server in this process: what programs post, and a page."""

from __future__ import annotations

import contextlib
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def receiving(take: Callable[[bytes], object], page: Callable[[], bytes] = bytes) -> Iterator[str]:
    """The URL of a server that hands over what is posted and shows a page. It answers with an error if `take` returns False."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken = take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(503 if taken is False else 200)
            self.end_headers()

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def read(url: str, **headers: str) -> str:
    """A page of this machine."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as page:
        return str(page.read().decode())
