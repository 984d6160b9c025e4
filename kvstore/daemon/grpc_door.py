"""The door for other machines and other languages: gRPC."""

from __future__ import annotations

import logging

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvstore import wire
from kvstore.daemon.grpc_admin import AdminServicer
from kvstore.daemon.grpc_calls import Calls
from kvstore.daemon.grpc_events import add_events
from kvstore.daemon.grpc_guard import Guard
from kvstore.daemon.grpc_store import StoreServicer
from kvstore.daemon.listening import Endpoint
from kvstore.daemon.service import Service
from kvstore.daemon.tokens import Tenants, check_bind
from kvstore.errors import SettingsError
from kvstore.proto import admin_pb2, admin_pb2_grpc, store_pb2, store_pb2_grpc
from kvstore.settings import DaemonSettings

log = logging.getLogger(__name__)

ORIGIN = "daemon.grpc"
STREAMS = 100  # calls of one connection at once; more wait
GRACE_S = 1.0  # for calls that are being answered when the daemon ends

_OPTIONS = (
    ("grpc.max_receive_message_length", wire.MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", wire.MAX_FRAME_BYTES),
    ("grpc.max_concurrent_streams", STREAMS),
    # A client whose machine has gone is noticed within half a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # And one that says nothing at all is sent away.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # Or a second daemon would share the port in silence.
    ("grpc.so_reuseport", 0),
)


def credentials_of(asked: DaemonSettings) -> grpc.ServerCredentials | None:
    """TLS as the settings say; None where no certificate is named. They were checked before."""
    if asked.tls_certificate is None:
        return None
    certificate = asked.tls_certificate.read_bytes()
    key = certificate if asked.tls_key is None else asked.tls_key.read_bytes()
    if asked.tls_client_ca is None:
        return grpc.ssl_server_credentials([(key, certificate)])
    return grpc.ssl_server_credentials(
        [(key, certificate)],
        root_certificates=asked.tls_client_ca.read_bytes(),
        require_client_auth=True,
    )


class GrpcDoor:
    """Store, Admin, Events, health and reflection, in the event loop that opened it."""

    def __init__(self, server: grpc.aio.Server, port: int, state: health.aio.HealthServicer):
        """Use `open`."""
        self._server = server
        self._state = state
        self.port = port

    @classmethod
    async def open(
        cls,
        service: Service,
        tenants: Tenants,
        endpoint: Endpoint,
        credentials: grpc.ServerCredentials | None = None,
    ) -> GrpcDoor:
        """Listen. `service` and `tenants` are borrowed; without `credentials` there is no TLS.

        Raises SettingsError where that address cannot be listened on, or may not without tokens.
        """
        check_bind(endpoint.host, tenants, ORIGIN)
        most = service.limits.connections
        server = grpc.aio.server(
            interceptors=(Guard(),),
            options=(*_OPTIONS, ("grpc.max_allowed_incoming_connections", most)),
            maximum_concurrent_rpcs=most,
        )
        address = str(endpoint) if endpoint.host else f"[::]:{endpoint.port}"
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
        except RuntimeError:
            await server.start()  # one that has never run cannot be stopped, and would stay
            await server.stop(None)
            raise SettingsError(
                f"{ORIGIN} = {endpoint}: cannot listen there; is another process doing so?"
            ) from None
        calls = Calls(service, tenants)
        store_pb2_grpc.add_StoreServicer_to_server(StoreServicer(service, calls), server)
        admin_pb2_grpc.add_AdminServicer_to_server(AdminServicer(service, calls), server)
        served = [
            file.services_by_name[name].full_name
            for file, name in ((store_pb2.DESCRIPTOR, "Store"), (admin_pb2.DESCRIPTOR, "Admin"))
        ]
        served.append(add_events(server, service, calls))
        state = health.aio.HealthServicer()
        for name in served:
            await state.set(name, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(state, server)
        reflection.enable_server_reflection(
            (*served, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        await server.start()
        return cls(server, port, state)

    async def close(self) -> None:
        """Take no more calls, and end those that go on after a moment."""
        await self._state.enter_graceful_shutdown()
        await self._server.stop(GRACE_S)
