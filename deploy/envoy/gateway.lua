-- Runs on every call, outside of the JSON transcoder: requests come here before it, answers after it.
-- HTTP_STATUS, the error table, comes from errors.lua.

-- What reaches the services. A `grpc-timeout` or a `…-bin` header of a REST caller would be taken for
-- gRPC's own, and a service would fail on it.
local REQUEST_HEADERS = {
  [":authority"] = true, [":method"] = true, [":path"] = true, [":scheme"] = true,
  ["content-type"] = true,
  -- Routing needs the scheme.
  ["x-forwarded-proto"] = true,
  ["x-admin-key"] = true, ["x-platform-key"] = true, ["x-request-id"] = true,
}
local GRPC_REQUEST_HEADERS = {
  ["grpc-accept-encoding"] = true, ["grpc-encoding"] = true, ["grpc-timeout"] = true, ["te"] = true,
  ["user-agent"] = true,
}
for name in pairs(REQUEST_HEADERS) do GRPC_REQUEST_HEADERS[name] = true end

-- What a REST caller gets of an answer's headers. The x-request-id is put on later.
local RESPONSE_HEADERS = {
  [":status"] = true, ["content-length"] = true, ["content-type"] = true, ["retry-after"] = true,
}

-- gRPC codes of errors without our ErrorInfo. gRPC itself made them, so they may share the number of a
-- documented code but never its meaning.
local TRANSIENT = {
  ["1"] = true,  -- CANCELLED: the server is shutting down
  ["4"] = true,  -- DEADLINE_EXCEEDED
  ["8"] = true,  -- RESOURCE_EXHAUSTED: too many calls at once
  ["14"] = true, -- UNAVAILABLE
}

local ERROR_INFO = '{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"'
local RETRY_INFO = '{"@type":"type.googleapis.com/google.rpc.RetryInfo","retry_delay":"'

local function keep(headers, names)
  local others = {}
  for name in pairs(headers) do
    if not names[name] then others[#others + 1] = name end
  end
  for _, name in ipairs(others) do headers:remove(name) end
end

local function is_grpc(headers)
  local content_type = headers:get("content-type")
  return content_type == "application/grpc" or content_type ~= nil and content_type:sub(1, 17) == "application/grpc+"
end

-- The JSON string that begins at `from`, without its quotes and still escaped.
local function json_string(text, from)
  local at = from
  while true do
    at = text:find('["\\]', at)
    if text:sub(at, at) == '"' then return text:sub(from, at - 1) end
    at = at + 2
  end
end

-- Status, body and Retry-After of an error. `message` is escaped for JSON already.
local function envelope(code, message, retry_after)
  return HTTP_STATUS[code], '{"error":{"code":"' .. code .. '","message":"' .. message .. '"}}', retry_after
end

-- What the transcoder says of a request it cannot read, without the words of protobuf.
local function invalid_request(complaint)
  local unknown = complaint:match('^Could not find field "([%w%%_.-]*)')
    or complaint:match('^Encountered a non%-leaf field "([%w_]*)')
  if unknown then
    return envelope("INVALID_REQUEST", "unknown query parameter " .. unknown)
  end
  local repeated = complaint:match("Cannot set '([%w_.]+)' for type oneof$")
  if repeated then
    return envelope("INVALID_REQUEST", repeated .. " is given more than once")
  end
  local differing = complaint:match("^The binding value .* of the field ([%w_.]+) is conflicting")
  if differing then
    return envelope("INVALID_REQUEST", differing .. " is not the same in path and body")
  end
  local field = complaint:match("^([%w_.]+): invalid value")
    or complaint:match("^: invalid value Starting an object on a scalar field for type ([%w_]+)$")
  if field then
    return envelope("INVALID_REQUEST", field .. " has an invalid value")
  end
  return envelope("INVALID_REQUEST", "the body is not the JSON object that this call takes")
end

local function unnamed_error(grpc_code)
  if TRANSIENT[grpc_code] then
    return envelope("UNAVAILABLE", "the service is not available, try again", "1")
  end
  return envelope("INTERNAL", "internal error; the x-request-id of this answer leads to the log")
end

-- A google.rpc.Status in JSON, as the transcoder prints it. No quote inside of a JSON string is bare,
-- so that nothing in a message can be taken for the ErrorInfo.
local function service_error(status, grpc_code)
  local _, info = status:find(ERROR_INFO, 1, true)
  local code = info and status:match('^([A-Z_]+)","domain":"platform%.september"', info + 1)
  if not HTTP_STATUS[code] then return unnamed_error(grpc_code) end
  local _, retry = status:find(RETRY_INFO, 1, true)
  local seconds = retry and status:match('^([%d.]+)s"', retry + 1)
  local _, message = status:find('"message":"', 1, true)
  return envelope(code, json_string(status, message + 1),
    seconds and string.format("%d", math.max(1, math.ceil(tonumber(seconds)))))
end

-- Methods whose answers in REST are not what the transcoder makes of the message; nil if this one is.
local REWRITTEN = {
  -- REST says `"engine":null`, which protobuf leaves out.
  Admit = function(body)
    local denial = body:match('^{"admitted":false,(.*)')
    return denial and '{"admitted":false,"engine":null,' .. denial
  end,
  -- REST answers with the engine itself; the transcoder has no `response_body`.
  GetEngine = function(body) return body:match('^{"engine":(.*)}$') end,
}

-- Status, body and Retry-After that replace those of a REST answer, or nil for those that are right.
local function rewrite(headers, body, method)
  local status, content_type = headers:get(":status"), headers:get("content-type")
  if status == "200" and content_type == "application/json" and body ~= "" then
    local replacement = REWRITTEN[method](body)
    return replacement and status, replacement
  end
  -- local_reply_config wrote it; HEAD gets its length without the body.
  if body:sub(1, 10) == '{"error":{' or body == "" and (headers:get("content-length") or "0") ~= "0" then
    return nil
  end
  if status == "400" and content_type == "text/plain" then return invalid_request(body) end
  return service_error(body, body:match('^{"code":(%d+)') or headers:get("grpc-status"))
end

local function replace_answer(handle, method)
  local buffer = handle:body(true)
  local headers = handle:headers() -- what was fetched before the wait for the body is void
  local status, body, retry_after = rewrite(headers, buffer and buffer:getBytes(0, buffer:length()) or "", method)
  keep(headers, RESPONSE_HEADERS)
  if not status then return end
  headers:replace(":status", status)
  headers:replace("content-type", "application/json")
  if retry_after then headers:replace("retry-after", retry_after) end
  -- Between headers and trailers without a message there is nothing that could become a body.
  if buffer then buffer:setBytes(body) end
end

function envoy_on_request(handle)
  local headers = handle:headers()
  -- Nothing would come of an upgrade, but its request would never end.
  if headers:get("upgrade") then
    local _, body = envelope("INVALID_REQUEST", "a connection cannot be upgraded")
    handle:respond({[":status"] = "400"}, body)
  end
  keep(headers, is_grpc(headers) and GRPC_REQUEST_HEADERS or REQUEST_HEADERS)
end

-- Whether a REST answer is right as it is, line by line if it is a watch.
local function is_right(headers, method)
  return headers:get(":status") == "200" and headers:get("content-type") == "application/json"
    and (headers:get("grpc-status") or "0") == "0" and not REWRITTEN[method]
    and (method == "WatchEngine" or headers:get("content-length") ~= "0")
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local method = handle:streamInfo():routeName() -- each route has the name of its method
  local watch = method == "WatchEngine"
  -- For a REST caller the transcoder turns every gRPC status but OK into another HTTP status than 200,
  -- and OK without a message is no answer. Only a watch may end before it has seen anything.
  if headers:get(":status") == "200" and is_grpc(headers) and (watch or headers:get("grpc-status") ~= "0") then
    -- Envoy says UNKNOWN; the servers say RESOURCE_EXHAUSTED when they are called without a gateway.
    if headers:get("grpc-message") == "the message is over 64 KiB" then headers:replace("grpc-status", "8") end
    return
  end
  if is_right(headers, method) then
    keep(headers, RESPONSE_HEADERS)
    if watch then headers:replace("content-type", "application/x-ndjson") end
  else
    replace_answer(handle, method)
  end
  local trailers = handle:trailers()
  if trailers then keep(trailers, {}) end
end
