"""Listens, and ignores SIGTERM."""

import signal

from tests.engines import never_healthy

if __name__ == "__main__":
    # Blocked, not ignored: the handler that the other module sets is never called.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    never_healthy.main()
