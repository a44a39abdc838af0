from services.admission.app import serve
from services.admission.settings import AdmissionSettings
from services.shared.service import run

if __name__ == "__main__":
    run("admission", AdmissionSettings, serve)
