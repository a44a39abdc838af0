"""Becomes a command that ends when its parent does: `python -m services.shared.child PARENT_PID COMMAND…`.

Run by the parent itself, so that nothing has to happen between fork and exec.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, *command = sys.argv[1:]
    # Kept over exec. SIGKILL, since nobody is left to see to an orderly end: the next start carries
    # on from any line. It comes at the end of the thread that forked, so that must be the main one.
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        sys.exit("the kernel knows no PR_SET_PDEATHSIG")
    # A parent that ended before is not noticed by the kernel.
    if os.getppid() != int(parent):
        sys.exit("the parent has ended")
    os.execvp(command[0], command)  # noqa: S606 - the point of it


if __name__ == "__main__":
    main()
