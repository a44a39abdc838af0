from services.provisioner.app import serve
from services.provisioner.settings import ProvisionerSettings
from services.shared.service import run

if __name__ == "__main__":
    run("provisioner", ProvisionerSettings, serve)
