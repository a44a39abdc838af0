"""Admit through real servers: the contract's session, its silent cases, and its races."""

from september.admission.v1 import admission_service_pb2 as pb
from september.engine.v1 import denial_pb2, engine_pb2
from tests.harness import Clients

STATUS = engine_pb2.Engine.Status
REASON = denial_pb2.Denial.Reason


async def test_a_user_without_an_engine_is_denied_unless_it_may_be_made(clients: Clients) -> None:
    product = await clients.register()
    denied = await clients.admission.Admit(pb.AdmitRequest(user_id="u1"), metadata=product.metadata)
    assert not denied.admitted
    assert denied.reason == REASON.engine_not_found
    assert not denied.HasField("engine")

    first = await clients.admission.Admit(
        pb.AdmitRequest(user_id="u1", auto_provision=True), metadata=product.metadata
    )
    assert first.admitted
    assert not first.HasField("reason")
    assert first.engine.status == STATUS.running
    assert first.engine.api_key.startswith("sk-sept-")

    again = await clients.admissions[1].Admit(pb.AdmitRequest(user_id="u1"), metadata=product.metadata)
    assert again.engine == first.engine
    got = await clients.admission.GetEngine(pb.GetEngineRequest(user_id="u1"), metadata=product.metadata)
    assert got.engine == first.engine
