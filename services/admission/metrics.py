"""What Admission tells Prometheus; how long calls take, the gateway tells."""

from prometheus_client import Counter, Gauge, Histogram

from services.admission.domain import DenialReason
from services.shared.metrics import Tally, foresee

ADMITTED = "admitted"

ADMITS = Tally(
    "september_admits",
    "Calls of Admit that were answered, by `answer`: `admitted`, or why not; errors are counted apart.",
    "answer",
    (ADMITTED, *DenialReason),
)
STALE = Gauge("september_read_model_stale", "1 while the registry is done without, from memory.")
REMEMBERED = Gauge(
    "september_read_model_entries",
    "What is remembered, by `of`: platform `keys`, or `engines`; absent ones too.",
    ["of"],
)
SHARES = Gauge("september_limiter_share", "Admits a minute of the rate limits that this replica holds, all products.")
LIMITER_WAITING = Gauge("september_limiter_waiting", "Calls that wait until the registry grants a token.")
TOKENS = Counter("september_limiter_tokens", "Tokens of rate limits that calls have taken.")
CLAIMS = Counter("september_limiter_claims", "Claims for shares of rate limits that were sent to the registry.")
EXCHANGES = Counter(
    "september_limiter_exchanges", "Round trips of the rate limiter, by `result`: `answered` or `failed`.", ["result"]
)
FLUSHES = Counter(
    "september_activity_flushes", "Writes of who was admitted, by `result`: `written` or `failed`.", ["result"]
)
PROVISIONER_CALLS = Histogram(
    "september_provisioner_call_seconds",
    "Calls of the Provisioner for engines that do not run, by `result`: `answered`, `refused` or `unreachable`.",
    ["result"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
foresee(EXCHANGES, ("answered", "failed"))
foresee(FLUSHES, ("written", "failed"))
foresee(PROVISIONER_CALLS, ("answered", "refused", "unreachable"))
