"""Calls that are refused: by key, by role, by form. Nothing is written, nothing of the inside shown."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct

from september.provisioner.v1 import product_service_pb2 as product_pb
from september.provisioner.v1 import provisioner_service_pb2 as pb
from services.shared.authorization import ROLES, Role
from services.shared.keys import new_platform_key
from tests.harness import Clients, Platform, Service, reason

Shared = tuple[Platform, list[Service]]
Metadata = tuple[tuple[str, str], ...]
ADMISSION = "/september.admission.v1.AdmissionService/"
PRODUCT_METHODS = [m for m, role in ROLES.items() if role is Role.PRODUCT and not m.startswith(ADMISSION)]
ADMIN_METHODS = [m for m, role in ROLES.items() if role is Role.ADMIN]
SCOPED_METHODS = [m for m, role in ROLES.items() if role is Role.PRODUCT_OR_ADMIN]


async def call(service: Service, method: str, metadata: Metadata, request: bytes = b"") -> bytes:
    async with grpc.aio.insecure_channel(service.address) as channel:
        send: Any = channel.unary_unary(method)
        answer: bytes = await send(request, metadata=metadata, timeout=10)
        return answer


def bad_keys(name: str, good: str, other: str) -> list[Metadata]:
    return [
        (),
        ((name, ""),),
        ((name, "nonsense"),),
        ((name, new_platform_key()),),
        ((name, good), (name, good)),
        ((name, good), (name, "nonsense")),
        ((name, "nonsense"), (name, good)),
        ((name, f"{good},{good}"),),
        ((name, good + " x"),),
        ((name, good.swapcase()),),
        ((name, other),),
        (("authorization", f"Bearer {good}"),),
    ]


async def test_every_method_wants_its_key_exactly_once(clients: Clients, shared: Shared) -> None:
    platform, (provisioner, admission, _) = shared
    product = await clients.register()
    methods = [(provisioner, m) for m in PRODUCT_METHODS + SCOPED_METHODS] + [
        (admission, ADMISSION + "Admit"),
        (admission, ADMISSION + "GetEngine"),
    ]
    wrong_platform_keys = bad_keys("x-platform-key", product.key, platform.admin_key)
    wrong_admin_keys = bad_keys("x-admin-key", platform.admin_key, product.key)
    calls = [(service, method, wrong_platform_keys, "INVALID_PLATFORM_KEY") for service, method in methods]
    calls += [(provisioner, method, wrong_admin_keys, "INVALID_PLATFORM_KEY") for method in SCOPED_METHODS]
    calls += [(provisioner, method, wrong_admin_keys, "INVALID_ADMIN_KEY") for method in ADMIN_METHODS]
    rows = platform.query("SELECT count(*) FROM operations")
    for service, method, wrong_keys, code in calls:
        answers = set()
        for metadata in wrong_keys:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(service, method, metadata)
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED, (method, metadata)
            assert reason(error.value) == code
            answers.add(error.value.details())
        # A wrong key is told apart from a missing one by nothing.
        assert len(answers) == 1, method
    assert platform.query("SELECT count(*) FROM operations") == rows


async def test_a_key_opens_the_methods_of_its_role_alone(clients: Clients, shared: Shared) -> None:
    product = await clients.register()
    keys = {Role.PRODUCT: product.metadata, Role.ADMIN: clients.admin}
    opened = {Role.PRODUCT: {Role.PRODUCT}, Role.ADMIN: {Role.ADMIN}, Role.PRODUCT_OR_ADMIN: set(keys)}
    for method in PRODUCT_METHODS + ADMIN_METHODS + SCOPED_METHODS:
        for shown, metadata in keys.items():
            try:
                await call(shared[1][0], method, metadata)
                code = grpc.StatusCode.OK
            except grpc.aio.AioRpcError as error:
                code = error.code()
            assert (code is not grpc.StatusCode.UNAUTHENTICATED) == (shown in opened[ROLES[method]]), (method, shown)


async def test_every_method_has_a_role(shared: Shared) -> None:
    from september.provisioner.v1 import fleet_service_pb2, product_service_pb2, provisioner_service_pb2

    files = (fleet_service_pb2, product_service_pb2, provisioner_service_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert methods == {*PRODUCT_METHODS, *ADMIN_METHODS, *SCOPED_METHODS}


@pytest.mark.parametrize("method", ["/september.provisioner.v1.ProvisionerService/Nothing", "/nothing", "/"])
async def test_an_unknown_method_is_unimplemented(shared: Shared, method: str) -> None:
    for service in shared[1][:2]:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(service, method, ())
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("request_bytes", [b"\xff", b"\x0a\x01\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x08"])
async def test_a_malformed_message_is_the_callers_error(clients: Clients, shared: Shared, request_bytes: bytes) -> None:
    product = await clients.register()
    for service, method in ((shared[1][0], PRODUCT_METHODS[0]), (shared[1][1], ADMISSION + "Admit")):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(service, method, product.metadata, request_bytes)
        assert reason(error.value) == "INVALID_REQUEST"


async def test_a_message_over_the_limit_is_refused(clients: Clients, shared: Shared) -> None:
    product = await clients.register()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call(shared[1][1], ADMISSION + "Admit", product.metadata, b"\x00" * 70_000)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_headers_as_long_as_the_gateway_passes_are_read(clients: Clients, shared: Shared) -> None:
    product = await clients.register()
    long = (*product.metadata, *((f"x-{i}", "x" * 4_000) for i in range(4)))
    for service, method in ((shared[1][0], PRODUCT_METHODS[0]), (shared[1][1], ADMISSION + "GetEngine")):
        # Some of many would be refused, if they were near a limit.
        for _ in range(50):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(service, method, long)
            assert reason(error.value) == "INVALID_REQUEST"


def registration(slug: str, policy: dict[str, Any] | None) -> product_pb.RegisterProductRequest:
    request = product_pb.RegisterProductRequest(slug=slug)
    if policy is not None:
        request.policy.update(policy)
    return request


@pytest.mark.parametrize(
    ("slug", "policy", "named"),
    [
        ("", {"max_engines": 1}, "slug"),
        ("A", {"max_engines": 1}, "slug"),
        ("1a", {"max_engines": 1}, "slug"),
        ("a_b", {"max_engines": 1}, "slug"),
        ("a" * 64, {"max_engines": 1}, "slug"),
        ("a\n", {"max_engines": 1}, "slug"),
        ("good", None, "policy"),
        ("good", {}, "policy"),
        ("good", {"max_engins": 1}, "policy.max_engins"),
        ("good", {"max_engines": -1}, "policy.max_engines"),
        ("good", {"max_engines": 1, "rate_limit_rpm": 0.5}, "policy.rate_limit_rpm"),
    ],
)
async def test_a_bad_registration_names_the_field(
    clients: Clients, slug: str, policy: dict[str, Any] | None, named: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await clients.products.RegisterProduct(registration(slug, policy), metadata=clients.admin)
    assert reason(error.value) == "INVALID_REQUEST"
    assert (error.value.details() or "").startswith(named)


async def test_a_slug_is_registered_once(clients: Clients) -> None:
    product = await clients.register()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await clients.products.RegisterProduct(registration(product.slug, {"max_engines": 1}), metadata=clients.admin)
    assert reason(error.value) == "PRODUCT_SLUG_EXISTS"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
async def test_a_number_that_json_does_not_have_is_refused(clients: Clients, number: float) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await clients.products.RegisterProduct(registration("good", {"max_engines": number}), metadata=clients.admin)
    assert reason(error.value) == "INVALID_REQUEST"
    assert (error.value.details() or "").startswith("policy: ")


async def test_a_policy_is_in_force_on_the_next_request(clients: Clients) -> None:
    product = await clients.register(max_engines=0)
    ensure = pb.EnsureEngineRequest(user_id="u1", auto_provision=True)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await clients.provisioner.EnsureEngine(ensure, metadata=product.metadata)
    assert reason(error.value) == "QUOTA_EXCEEDED"
    request = product_pb.UpdatePolicyRequest(product_id=product.product_id)
    request.policy.update({"max_engines": 1, "rate_limit_rpm": 30, "allowed_images": ["services.*"]})
    answer = await clients.products.UpdatePolicy(request, metadata=clients.admin)
    assert (answer.policy.max_engines, answer.policy.rate_limit_rpm) == (1, 30)
    assert answer.policy.allowed_images == ["services.*"]
    made = await clients.provisioner.EnsureEngine(ensure, metadata=product.metadata)
    assert made.HasField("engine")


@pytest.mark.parametrize(
    ("product_id", "code"),
    [("", "INVALID_REQUEST"), ("x", "INVALID_REQUEST"), ("0768a166-a414-4a19-a6b6-3d4f3a11b46a", "PRODUCT_NOT_FOUND")],
)
async def test_a_policy_for_no_product_is_refused(clients: Clients, product_id: str, code: str) -> None:
    policy = Struct()
    policy.update({"max_engines": 1})
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await clients.products.UpdatePolicy(
            product_pb.UpdatePolicyRequest(product_id=product_id, policy=policy), metadata=clients.admin
        )
    assert reason(error.value) == code


async def test_a_bug_shows_a_request_id_and_nothing_else(platform: Platform, connect: Callable[..., Clients]) -> None:
    """The bug here is a key that can't be read: another master key than the one it was written with."""
    provisioner = platform.provisioner()
    product = await connect(platform, provisioner).register()
    ensure = pb.EnsureEngineRequest(user_id="u1", auto_provision=True)
    await connect(platform, provisioner).provisioner.EnsureEngine(ensure, metadata=product.metadata)
    provisioner.terminate()
    other_key = "A" * 43 + "="
    provisioner = platform.provisioner(ORCH_MASTER_KEY=other_key)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await connect(platform, provisioner).provisioner.EnsureEngine(
            ensure, metadata=(*product.metadata, ("x-request-id", "the-request"))
        )
    assert error.value.code() is grpc.StatusCode.INTERNAL
    assert error.value.details() == "internal error; request id the-request"
    failed = [e for e in provisioner.events() if e["event"] == "call_failed"]
    assert [e["request_id"] for e in failed] == ["the-request"]


async def test_no_key_is_in_any_log_or_in_the_database(clients: Clients, shared: Shared) -> None:
    platform, services = shared
    product = await clients.register()
    made = await clients.provisioner.ProvisionEngine(pb.ProvisionEngineRequest(user_id="u1"), metadata=product.metadata)
    dump = str(
        [
            platform.query(f"SELECT * FROM {t}")
            for t in ("products", "platform_keys", "engines", "operations", "audit_events")
        ]
    )
    texts = [dump, *(service.log_file.read_text() for service in services)]
    texts += [str(p.environ()) + str(p.cmdline()) for p in platform.engine_processes()]
    for secret in (product.key, made.api_key, platform.admin_key, platform.environment["ORCH_MASTER_KEY"]):
        assert not any(secret in text for text in texts)
