"""Who may call what: one table of all services, and nothing is served that is not in it."""

from enum import Enum, auto


class Role(Enum):
    ANYONE = auto()
    PRODUCT = auto()
    ADMIN = auto()
    # Products see their own, operators all.
    PRODUCT_OR_ADMIN = auto()


_ADMISSION = "/september.admission.v1.AdmissionService/"
_PROVISIONER = "/september.provisioner.v1.ProvisionerService/"
_PRODUCT = "/september.provisioner.v1.ProductService/"
_FLEET = "/september.provisioner.v1.FleetService/"
ROLES = {
    "/grpc.health.v1.Health/Check": Role.ANYONE,
    "/grpc.health.v1.Health/Watch": Role.ANYONE,
    _ADMISSION + "Admit": Role.PRODUCT,
    _ADMISSION + "GetEngine": Role.PRODUCT,
    _ADMISSION + "CheckHealth": Role.ANYONE,
    _PROVISIONER + "ProvisionEngine": Role.PRODUCT,
    _PROVISIONER + "DestroyEngine": Role.PRODUCT,
    _PROVISIONER + "StartEngine": Role.PRODUCT,
    _PROVISIONER + "StopEngine": Role.PRODUCT,
    _PROVISIONER + "SleepEngine": Role.PRODUCT,
    _PROVISIONER + "WakeEngine": Role.PRODUCT,
    _PROVISIONER + "RotateEngineKey": Role.PRODUCT,
    _PROVISIONER + "WatchEngine": Role.PRODUCT,
    _PROVISIONER + "EnsureEngine": Role.PRODUCT,
    _PRODUCT + "RegisterProduct": Role.ADMIN,
    _PRODUCT + "UpdatePolicy": Role.ADMIN,
    _PRODUCT + "ListProducts": Role.ADMIN,
    _PRODUCT + "GetProduct": Role.ADMIN,
    _PRODUCT + "RotatePlatformKey": Role.ADMIN,
    _PRODUCT + "DisableProduct": Role.ADMIN,
    _PRODUCT + "EnableProduct": Role.ADMIN,
    _FLEET + "ListEngines": Role.PRODUCT_OR_ADMIN,
    _FLEET + "GetFleetStatus": Role.PRODUCT_OR_ADMIN,
    _FLEET + "GetFleetMetrics": Role.PRODUCT_OR_ADMIN,
    _FLEET + "ListAuditEvents": Role.PRODUCT_OR_ADMIN,
    _FLEET + "GetEngineHistory": Role.PRODUCT,
}
