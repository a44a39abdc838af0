-- Runs on every call that leaves for a service of another process. keep comes from headers.lua.

-- What reaches the services. A `grpc-timeout` or a `…-bin` header of a REST caller would be taken for
-- gRPC's own, and a service would fail on it.
local REQUEST_HEADERS = {
  [":authority"] = true, [":method"] = true, [":path"] = true, [":scheme"] = true,
  ["content-length"] = true, ["content-type"] = true, ["te"] = true, ["x-forwarded-proto"] = true,
  -- The log and the answers that Envoy makes itself need these two.
  ["x-envoy-original-method"] = true, ["x-envoy-original-path"] = true,
  ["idempotency-key"] = true, ["x-admin-key"] = true, ["x-platform-key"] = true, ["x-request-id"] = true,
}
local GRPC_REQUEST_HEADERS = {
  ["grpc-accept-encoding"] = true, ["grpc-encoding"] = true, ["grpc-timeout"] = true, ["user-agent"] = true,
}
for name in pairs(REQUEST_HEADERS) do GRPC_REQUEST_HEADERS[name] = true end

function envoy_on_request(handle)
  local headers = handle:headers()
  -- The transcoder has put it there, and nobody else can.
  keep(headers, headers:get("x-envoy-original-path") and REQUEST_HEADERS or GRPC_REQUEST_HEADERS)
end
