-- Runs on every call. What comes from one address with keys that are not known to be good is passed on so many times a
-- second, fewer once a service has refused some because too many were wrong; the rest is refused here, at a fraction of the
-- cost. Each of Envoy's threads knows what it has seen itself.

-- 500 a second, and as many at once: a good key may come with these before its first answer.
local APART_MS, AT_ONCE = 2, 500
-- Of an address that floods: 100 a second, evenly, since a crowd of them would hold others up. It is taken to do so for some
-- seconds after a service has said it.
local APART_OF_FLOOD_MS, AT_ONCE_OF_FLOOD, FLOOD_S = 10, 5, 10
-- Of each kind so many things are remembered, and the oldest of twice as many forgotten together.
local MOST = 10000
REFUSED_HERE = "x-flood"
-- These take no key.
local HEALTH = {["/health"] = true, ["/september.admission.v1.AdmissionService/CheckHealth"] = true}

local function refusal(code, grpc_status, message)
  local headers = {[":status"] = HTTP_STATUS[code], ["retry-after"] = "1", [REFUSED_HERE] = grpc_status}
  return {headers = headers, grpc = message, rest = '{"error":{"code":"' .. code .. '","message":"' .. message .. '"}}'}
end

local TOO_MANY = refusal("RATE_LIMITED", "8", "too many wrong keys from this address")
-- While services can't say of a key whether it is good.
local UNAVAILABLE = refusal("UNAVAILABLE", "14", "the service is not available, try again")

local function memory()
  local young, old, count = {}, {}, 0
  local function get(name)
    local value = young[name]
    if value == nil then value = old[name] end
    return value
  end
  local function set(name, value)
    if young[name] == nil then
      if count == MOST then young, old, count = {}, young, 0 end
      count = count + 1
    end
    young[name] = value
  end
  return get, set
end

-- Of keys the second in which they were last good, or false; of addresses the end of their flood, when the next may pass, and
-- what the others are told.
local last_good, set_last_good = memory()
local known_origin, set_origin = memory()

-- Of version 6 the first 64 bits, as services take them together; one of version 4 in another form is that.
local function network(address)
  if not address:find(":", 1, true) then return address end
  local mapped = address:match("^::ffff:([%d.]+)$")
  if mapped then return mapped end
  local before, after = address:match("^(.-)::(.*)$")
  if before then
    local _, groups = address:gsub("%x+", "")
    address = before .. (":0"):rep(8 - groups) .. ":" .. after
  end
  return address:match("^:?(%x+:%x+:%x+:%x+)")
end

local function origin_of(address)
  local name = network(address)
  local origin = known_origin(name)
  if not origin then
    origin = {flood_ends = 0, due_ms = 0, refusal = TOO_MANY}
    set_origin(name, origin)
  end
  return origin
end

local function passes(origin, now, now_ms)
  -- What is later than it can be is of before the clock was set back.
  if origin.flood_ends > now + FLOOD_S then origin.flood_ends = 0 end
  if origin.due_ms > now_ms + APART_OF_FLOOD_MS then origin.due_ms = 0 end
  local apart_ms, at_once = APART_MS, AT_ONCE
  if now < origin.flood_ends then apart_ms, at_once = APART_OF_FLOOD_MS, AT_ONCE_OF_FLOOD end
  local due_ms = math.max(origin.due_ms, now_ms - at_once * apart_ms)
  if due_ms > now_ms then return false end
  origin.due_ms = due_ms + apart_ms
  return true
end

function envoy_on_request(handle)
  local headers = handle:headers()
  -- A listener knows one of the two.
  local key = headers:get("x-platform-key") or headers:get("x-admin-key") or ""
  local now, good = os.time(), last_good(key)
  if good == now then return end
  local address = headers:get("x-envoy-external-address")
  if not good and not HEALTH[headers:get(":path")] then
    local origin = origin_of(address)
    if not passes(origin, now, handle:timestamp()) then
      -- By which envoy.yaml knows what to answer as it is, and not to log.
      headers:add("x-envoy-flood", "1")
      local refused = origin.refusal
      handle:respond(refused.headers, is_grpc(headers) and refused.grpc or refused.rest)
    end
  end
  handle:streamInfo():dynamicMetadata():set("september", "caller", address .. " " .. key)
end

-- What an answer says of the caller's key, and of the address that it came from. `body` is that of an error in REST.
function note_verdict(handle, headers, method, body)
  local noted = handle:streamInfo():dynamicMetadata():get("september")
  if not noted then return end
  local address, key = noted.caller:match("^(%S+) (.*)$")
  local status, code = headers:get(":status"), headers:get("grpc-status") or "0"
  local message = body or headers:get("grpc-message") or ""
  if status == "200" and code == "0" then
    if method ~= "CheckHealth" then set_last_good(key, os.time()) end
  elseif status == "401" or code == "16" then
    if last_good(key) then set_last_good(key, false) end
    origin_of(address).refusal = TOO_MANY
  elseif status == "503" or code == "14" then
    origin_of(address).refusal = UNAVAILABLE
  elseif (status == "429" or code == "8") and message:find(TOO_MANY.grpc, 1, true) then
    local origin = origin_of(address)
    origin.flood_ends, origin.refusal = os.time() + FLOOD_S, TOO_MANY
  end
end
