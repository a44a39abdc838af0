"""Ends at once, with an error."""

import sys

if __name__ == "__main__":
    sys.exit(1)
