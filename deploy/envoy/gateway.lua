-- Runs on every answer, outside of the JSON transcoder: it comes here after it.
-- HTTP_STATUS, the error table, comes from errors.lua, keep and is_grpc from headers.lua.

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

-- No denial in JSON is as long, and no answer with an engine, of which the names alone are longer, as short.
local DENIAL_BYTES = 100

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
  local answer = buffer and buffer:getBytes(0, buffer:length()) or ""
  local status, body, retry_after = rewrite(headers, answer, method)
  note_verdict(handle, headers, method, answer)
  keep(headers, RESPONSE_HEADERS)
  if not status then return end
  headers:replace(":status", status)
  headers:replace("content-type", "application/json")
  if retry_after then headers:replace("retry-after", retry_after) end
  -- Between headers and trailers without a message there is nothing that could become a body.
  if buffer then buffer:setBytes(body) end
end

-- Whether a REST answer is right as it is, line by line if it is a watch.
local function is_right(headers, method)
  if headers:get("content-type") ~= "application/json" or (headers:get("grpc-status") or "0") ~= "0" then return false end
  local length = headers:get("content-length")
  if method == "Admit" then return length ~= nil and tonumber(length) > DENIAL_BYTES end
  return not REWRITTEN[method] and (method == "WatchEngine" or length ~= "0")
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local refused = headers:get(REFUSED_HERE)
  if refused then
    headers:remove(REFUSED_HERE)
    -- Envoy says UNAVAILABLE of all.
    if is_grpc(headers) then headers:replace("grpc-status", refused) end
    return
  end
  local method = handle:streamInfo():routeName() -- each route has the name of its method
  local ok = headers:get(":status") == "200"
  if ok then note_verdict(handle, headers, method) end
  if ok and is_grpc(headers) then
    local code = headers:get("grpc-status")
    -- Envoy says UNKNOWN; the servers say RESOURCE_EXHAUSTED when they are called without a gateway.
    if code == "2" and headers:get("grpc-message") == "the message is over 64 KiB" then
      headers:replace("grpc-status", "8")
    end
    -- For a REST caller the transcoder turns every gRPC status but OK into another HTTP status than 200.
    if code ~= "0" then return end
  end
  local watch = method == "WatchEngine"
  -- OK without a message is no answer. Only a watch may end before it has seen anything.
  if ok and watch and is_grpc(headers) then return end
  if ok and is_right(headers, method) then
    keep(headers, RESPONSE_HEADERS)
    if watch then headers:replace("content-type", "application/x-ndjson") end
  else
    replace_answer(handle, method)
  end
  -- Envoy has none for HTTP/1.1, and to wait for them costs as much as all of the above.
  local trailers = handle:streamInfo():protocol() ~= "HTTP/1.1" and handle:trailers()
  if trailers then keep(trailers, {}) end
end
