"""Answers as the files in its volume say: `sick`, until the next start, that it is not well; `mute`, not at all."""

import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SICK, MUTE = Path("sick"), Path("mute")


class _Moody(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        while MUTE.exists():
            time.sleep(0.05)
        body = b'{"status":"ok"}'
        self.send_response(503 if SICK.exists() else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


if __name__ == "__main__":
    SICK.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with ThreadingHTTPServer((os.environ["HOST"], int(os.environ["PORT"])), _Moody) as server:
        server.daemon_threads = True
        server.serve_forever()
