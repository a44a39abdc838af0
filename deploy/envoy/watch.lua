-- Runs on watches. REST has no trailers, so a watch that failed would end like one whose engine is gone. gRPC-Web
-- has its trailers in the body: there they come by here, and at those of an error, left in, the transcoder breaks
-- off the answer.

function envoy_on_request(handle)
  local headers = handle:headers()
  if headers:get("x-envoy-original-path") then headers:replace("content-type", "application/grpc-web") end
end

function envoy_on_response(handle)
  local headers = handle:headers()
  if headers:get("content-type") ~= "application/grpc-web+proto" then return end
  headers:replace("content-type", "application/grpc")
  for chunk in handle:bodyChunks() do
    local trailers = chunk:getBytes(0, chunk:length())
    if trailers:find("^\128....grpc%-status:0\r\n") then chunk:setBytes("") end
  end
end
