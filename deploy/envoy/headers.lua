-- What the scripts on headers share.

function keep(headers, names)
  local others = {}
  for name in pairs(headers) do
    if not names[name] then others[#others + 1] = name end
  end
  for _, name in ipairs(others) do headers:remove(name) end
end

function is_grpc(headers)
  local content_type = headers:get("content-type")
  return content_type == "application/grpc" or content_type ~= nil and content_type:sub(1, 17) == "application/grpc+"
end
