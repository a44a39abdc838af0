"""Has a child that outlives it, writes the child's pid beside its database, then listens."""

import os
import subprocess
import sys
from pathlib import Path

from tests.engines import never_healthy

if __name__ == "__main__":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["SQLITE_DB_PATH"]).with_name("child.pid").write_text(str(child.pid))
    never_healthy.main()
