"""The log: JSON lines on standard error. Nothing of a request is ever logged."""

import json
import sys
import time


def log(event: str, **fields: object) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    sys.stderr.write(json.dumps({"time": now, "event": event} | fields) + "\n")
    sys.stderr.flush()
