-- For wrk: posts `{}` to the paths of a file, one after the other, and says what came of it as JSON.
-- Lines of the file: path, tabulator, platform key.

local prepared = {}
local next_one = 0

function init(args)
  for line in io.lines(args[1]) do
    local path, key = line:match("^(.-)\t(.*)$")
    prepared[#prepared + 1] =
      wrk.format("POST", path, {["content-type"] = "application/json", ["x-platform-key"] = key}, "{}")
  end
end

function request()
  next_one = next_one % #prepared + 1
  return prepared[next_one]
end

function done(summary, latency)
  local errors = 0
  for _, count in pairs(summary.errors) do errors = errors + count end
  io.write(string.format(
    '{"requests": %d, "duration_us": %d, "bytes": %d, "errors": %d, '
      .. '"percentiles_us": {"50": %d, "90": %d, "99": %d, "99.9": %d}}\n',
    summary.requests, summary.duration, summary.bytes, errors,
    latency:percentile(50), latency:percentile(90), latency:percentile(99), latency:percentile(99.9)))
end
