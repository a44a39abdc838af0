-- Runs on every call that leaves for a service of another process. keep comes from headers.lua.

-- What reaches the services. A `grpc-timeout` or a `…-bin` header of a REST caller would be taken for
-- gRPC's own, and a service would fail on it.
local REQUEST_HEADERS = {
  [":authority"] = true, [":method"] = true, [":path"] = true, [":scheme"] = true,
  ["content-length"] = true, ["content-type"] = true, ["te"] = true, ["x-forwarded-proto"] = true,
  -- Where the call comes from, which nobody else can say.
  ["x-envoy-external-address"] = true,
  -- The log and the answers that Envoy makes itself need these two.
  ["x-envoy-original-method"] = true, ["x-envoy-original-path"] = true,
  ["idempotency-key"] = true, ["x-admin-key"] = true, ["x-platform-key"] = true, ["x-request-id"] = true,
  ["traceparent"] = true,
}
local GRPC_REQUEST_HEADERS = {
  ["grpc-accept-encoding"] = true, ["grpc-encoding"] = true, ["grpc-timeout"] = true, ["user-agent"] = true,
}
for name in pairs(REQUEST_HEADERS) do GRPC_REQUEST_HEADERS[name] = true end

-- Whether a body is one message in gRPC's framing and nothing else. A server of grpc.aio never answers one that
-- ends too early, ignores what follows the first, and flags that it does not know.
local function is_one_message(body)
  if not body or body:length() < 5 then return false end
  local flag, a, b, c, d = body:getBytes(0, 5):byte(1, 5)
  return flag < 2 and ((a * 256 + b) * 256 + c) * 256 + d == body:length() - 5
end

function envoy_on_request(handle)
  local headers = handle:headers()
  -- The transcoder has put it there, and nobody else can.
  local rest = headers:get("x-envoy-original-path")
  keep(headers, rest and REQUEST_HEADERS or GRPC_REQUEST_HEADERS)
  -- A server of grpc.aio resets a stream that takes no trailers, which looks like a failure of its own.
  if not rest and (headers:get("te") ~= "trailers" or not is_one_message(handle:body())) then
    handle:respond({[":status"] = "400"}, "")
  end
end
