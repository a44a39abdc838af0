"""What the Provisioner tells Prometheus. What is read from the registry, all Provisioners tell alike."""

from itertools import product

from prometheus_client import Counter, Gauge, Histogram

from services.provisioner.domain.engine import EngineStatus
from services.provisioner.domain.operation import OperationKind, Outcome, Queue
from services.shared.metrics import foresee

POSTPONED, QUARANTINED, LEASE_LOST = "postponed", "quarantined", "lease_lost"
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

OPERATIONS = Counter(
    "september_operations",
    "Times that this process was done with an operation, by `kind` and `result`: `succeeded`, `failed`, `cancelled` (it"
    " gave way), `quarantined`; or `postponed` and `lease_lost`, after which it goes on here or elsewhere.",
    ["kind", "result"],
)
OPERATION_SECONDS = Histogram(
    "september_operation_seconds",
    "How long operations took that succeeded here, by `kind`: boots are `provision`, `start` and `restart`.",
    ["kind"],
    buckets=_BUCKETS,
)
BACKEND_CALLS = Histogram(
    "september_backend_call_seconds",
    "Calls of what runs engines, by `call` and `result`: `done`, `refused`, or `unavailable` for no answer in time.",
    ["call", "result"],
    buckets=_BUCKETS,
)
OPEN = Gauge("september_operations_open", "Operations that are under way or wait to be, by `queue`.", ["queue"])
OLDEST = Gauge(
    "september_operations_oldest_seconds", "Age of the oldest open operation that is not quarantined and no backup."
)
QUARANTINE = Gauge("september_operations_quarantined", "Operations that nobody tries any more.")
ENGINES = Gauge("september_engines", "Engines with an owner, by `status`.", ["status"])
POOL_MEMBERS = Gauge(
    "september_warm_pool_engines", "Members of this node's warm pool, by `state`: `ready` or `booting`.", ["state"]
)
POOL_SIZE = Gauge("september_warm_pool_size", "Members that this node's warm pool is to have.")
POOL_CLAIMS = Counter(
    "september_warm_pool_claims",
    "Searches of the warm pool for a new user, by `result`: `hit`, or `miss` if it had none, or the user an engine.",
    ["result"],
)
PORTS = Gauge("september_ports", "Ports of this node, by `state`: `leased`, `set_aside` or `free`.", ["state"])
DISK_FREE = Gauge(
    "september_disk_free_bytes",
    "Room that is left for engines' data, in bytes; not a number if this host doesn't see where Docker keeps it.",
)
DISK_FREE_MIN = Gauge("september_disk_free_min_bytes", "Room below which no engine is begun, in bytes.")
LEASE_TERM = Gauge(
    "september_loop_lease_term", "Term of each `loop`'s lease, as far as this process leads it; 0 otherwise.", ["loop"]
)
PROBES = Counter("september_probes", "Probes of running engines, by `result`: `well`, `ill` or `unknown`.", ["result"])
PROBER_ILL = Gauge(
    "september_prober_ill", "1 if in the last sweep so many engines were silent that it is the prober that is ill."
)
FAILURES = Counter("september_engine_failures", "Engines that have failed: their probes, or their instance ended.")
GIVEN_UP = Counter("september_restarts_given_up", "Engines that are not restarted any more after so many failures.")
REPAIRS = Counter("september_reconciler_repairs", "Engines that were found unlike their row.")
STRAYS = Gauge("september_reconciler_strays", "Instances without a row, as the last pass found them.")
STRAYS_REMOVED = Counter("september_reconciler_strays_removed", "Instances without a row that were removed.")
BRAKE = Gauge("september_reconciler_brake", "1 if the last pass found too many strays to remove any.")
REPLAYS = Counter("september_idempotency_replays", "Calls that got the answer of an earlier one with their key.")

for _kind, _result in product(OperationKind, (*Outcome, POSTPONED, QUARANTINED, LEASE_LOST)):
    OPERATIONS.labels(_kind, _result)
foresee(OPERATION_SECONDS, OperationKind)
foresee(OPEN, Queue)
foresee(ENGINES, EngineStatus)
foresee(POOL_MEMBERS, ("ready", "booting"))
foresee(POOL_CLAIMS, ("hit", "miss"))
foresee(PROBES, ("well", "ill", "unknown"))
