-- Runs on REST calls that take query parameters. Unknown ones the transcoder has refused, but it takes the last
-- of several values, names as `pageToken` and `page%5Ftoken` too, and the fields that the path has given.

function envoy_on_request(handle)
  local path = handle:headers():get("x-envoy-original-path")
  local query = path and path:match("%?(.*)")
  if not query then return end
  local known, seen = handle:filterContext(), {}
  for parameter in query:gmatch("[^&]+") do
    local name, equals = parameter:match("^([%w%%_.-]*)(=?)")
    local complaint = not known:get(name) and "unknown query parameter " .. name
      or equals == "" and name .. " has no value"
      or seen[name] and name .. " is given more than once"
    if complaint then
      local body = '{"error":{"code":"INVALID_REQUEST","message":"' .. complaint .. '"}}'
      handle:respond({[":status"] = "400"}, body)
    end
    seen[name] = true
  end
end
