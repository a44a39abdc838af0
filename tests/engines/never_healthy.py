"""Listens at once and is never healthy; ends on SIGTERM."""

import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Unhealthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"status":"starting"}'
        self.send_response(503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with ThreadingHTTPServer((os.environ["HOST"], int(os.environ["PORT"])), _Unhealthy) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
