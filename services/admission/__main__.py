import sys

from services.admission.app import serve, serve_as_worker
from services.admission.settings import AdmissionSettings
from services.admission.workers import WORKER
from services.shared.service import run

if __name__ == "__main__":
    run("admission", AdmissionSettings, serve_as_worker if sys.argv[1:] == [WORKER] else serve)
