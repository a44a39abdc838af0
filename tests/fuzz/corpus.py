"""What HTTP/1.1 requests are put together from: pieces that are right, wrong, or meant for another reader."""

import gzip

SMUGGLED = "/smuggled"

SEGMENTS = [
    "a", "ann", ".", "..", "%2e%2e", "%2E", "%2F", "%252F", "%5c", "%00", "%0d%0a", "%7f", "%c0%af", "%ed%a0%80",
    "%ff", "%", "%g1", "%F0%9F%98%80", "%u0041", "", "//", "/../", "/./", "a;b", "a?b", "*", "a%20b", "a+b", "\\",
    "..%2f", "%2e%2e%2f", "é", "\u2028", "\U0001f600", "\x80", "\xa0", "{user_id}", "x" * 256, "%41" * 300,
    "x" * 9000, "provision", "admit",
]  # fmt: skip
QUERIES = [
    "", "", "", "?", "?limit=1", "?limit=1&limit=2", "?limit=", "?limit", "?limit=1e999",
    "?limit=99999999999999999999", "?limit=-1", "?limit=%31", "?LIMIT=1", "?pageToken=a", "?page%5Ftoken=a",
    "?page_token=%00", "?page_token=AA", "?page_token=x%ff", "?status=running%00", "?status=é", "?user_id=b",
    "?policy.max_engines=1", "?policy=1", "?&&&", "?=", "?a[]=1", "?%", "?x=" + "y" * 9000,
    "?" + "&".join(f"a{i}=1" for i in range(500)), "?action=%C3%28", "?offset=2147483648", "?product_id=%7B%7D",
]  # fmt: skip
CALLS = [
    ("POST", "/engines/{}/admit"), ("GET", "/engines/{}"), ("GET", "/engines/{}/history"), ("GET", "/engines"),
    ("GET", "/audit"), ("GET", "/status"), ("GET", "/metrics"), ("GET", "/health"), ("GET", "/products"),
    ("GET", "/products/{}"), ("POST", "/products/register"), ("PUT", "/products/{}/policy"),
    ("POST", "/products/{}/rotate-key"), ("POST", "/engines/provision"), ("POST", "/engines/{}/admit/{}"),
    ("GET", "/{}"), ("GET", "/{}/{}"), ("POST", "/september.admission.v1.AdmissionService/{}"),
    ("POST", "/grpc.health.v1.Health/Check"),
]  # fmt: skip
VERBS = [
    "GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PRI", "get", "G\u00cbT", "", "X" * 300,
]  # fmt: skip
VALUES = [
    "", "a", "\x00", "\x7f", "\t", "a\x01b", "é", "\U0001f600", "\xff", "a, b", '"', "%0d%0a", "x" * 300, "x" * 20000,
    "-1", "1e9", "9" * 30, "*/*;q=nan", "gzip", "application/grpc", "application/grpc-web",
    "application/json; charset=utf-16", "chunked", "trailers", "keep-alive, x-platform-key", "close, close", "h2c",
    "100-continue", "bytes=0-", "1n", "99999999S",
]  # fmt: skip
NAMES = [
    "x-platform-key", "X-PLATFORM-KEY", "x_platform_key", "x-admin-key", "idempotency-key", "x-request-id",
    "content-type", "te", "accept", "accept-encoding", "content-encoding", "connection", "upgrade", "expect", "host",
    "cookie", "authorization", "range", "grpc-timeout", "grpc-encoding", "grpc-status", "grpc-message", "x-bin",
    "x-envoy-original-path", "x-envoy-original-method", "x-envoy-retry-on", "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-internal", "x-forwarded-for", "x-forwarded-proto", "forwarded", "via", "x-http-method-override",
    "proxy-connection", "http2-settings", "keep-alive", "trailer", "x-forwarded-host", ":path", ":method",
    ":authority", "x" * 300, "a b", "é", "\x00", "", "_", "a:b",
]  # fmt: skip
# Over the limits, of the wrong type, not JSON, or JSON that readers take differently.
BODIES = [
    b"", b"{}", b"null", b"[]", b"0", b'"a"', b"{", b"}", b"{}{}", b"\xef\xbb\xbf{}", "{}".encode("utf-16"),
    b"\xff\xfe", b"\x00" * 9, gzip.compress(b"{}", mtime=0), b"[" * 60_000, b'{"policy":' * 6_000,
    b'{"policy":{"a":' + b"[" * 60_000, b'{"slug":' + b'{"a":' * 9_000, b"[" * 100_000, b'{"a":' * 100_000,
    b'{"policy":{"max_engines":NaN}}', b'{"max_engines":NaN}', b'{"max_engines":Infinity}', b'{"max_engines":1e999}',
    b'{"max_engines":-1e999}', b'{"max_engines":1E400}', b'{"max_engines":0x10}', b'{"max_engines":01}',
    b'{"max_engines":' + b"9" * 5_000 + b"}", b'{"max_engines":1,"max_engines":2}',
    b'{"max_engines":1,"' + b"x" * 60_000 + b'":1}', b'{"allowed_images":[' + b'"a",' * 9_000 + b'"a"]}',
    b'{"max_engines":{}}', b'{"max_engines":null}', b'{"":1}', b'{"\\u0000":1}',
    b'{"slug":"a\\u0000","policy":{"max_engines":1}}', b'{"slug":"\\ud800","policy":{"max_engines":1}}',
    b'{"slug":"a"}', b'{"slug":"\xff","policy":{}}', b'{"slug":"\xed\xa0\x80","policy":{}}', b'{"slug":["a"]}',
    b'{"slug":{"a":1}}', b'{"slug":1e999}', b'{"auto_provision":true,"auto_provision":false}', b'{"autoProvision":1}',
    b'{"auto_provision":"yes"}', b"{'auto_wake':true}", b'{"keep_awake_s":1e3}', b'{"keep_awake_s":1.5}',
    b'{"keep_awake_s":"1"}', b'{"keep_awake_s":99999999999}', b'{"keep_awake_s":-0}', b'{"user_id":"b"}',
    b'{"user_id":"\\u0000"}', b'{"user_id":null}', b'{"user_id":"' + b"x" * 70_000 + b'"}', b'{"user_id":"a","x":1}',
    b'{"user_id":"' + b"x" * 65_500 + b'"}',
    b'{"engine_version":"169.254.169.254/x","user_id":"a"}', b'{"engine_version":"a\\u0000","user_id":"a"}',
    b'{"grace_s":-1}', b'{"@type":"type.googleapis.com/google.protobuf.Any"}', b"{/**/}", b"{} //", b'{"a":1,}',
    b"\x00\x00\x00\x00\x00", b"\x1f\x8b\x08",
]  # fmt: skip
# Two lengths, or one that two readers would take differently; {n} is that of the body, in which another request stands.
FRAMINGS = [
    b"content-length: {n}\r\ntransfer-encoding: chunked", b"transfer-encoding: chunked\r\ncontent-length: {n}",
    b"content-length: {n}\r\nTransfer-Encoding:\tchunked", b"content-length: {n}\r\ntransfer-encoding: xchunked",
    b"content-length: {n}\r\ntransfer-encoding: chunked, identity",
    b"content-length: {n}\r\ntransfer-encoding: identity, chunked",
    b"content-length: {n}\r\ntransfer-encoding: chunked\r\ntransfer-encoding: x",
    b"content-length: {n}\r\ntransfer-encoding : chunked", b"content-length: {n}\r\n transfer-encoding: chunked",
    b"content-length: {n}\r\nx: y\r\n transfer-encoding: chunked",
    b"content-length: {n}\r\ntransfer-encoding: \x0bchunked",
    b"content-length: {n}\r\ntransfer-encoding: chunked\x00", b"content-length: {n}\r\ntransfer_encoding: chunked",
    b"content-length: {n}\ntransfer-encoding: chunked", b"content-length: {n}\rtransfer-encoding: chunked",
    b"content-length: {n}\r\ncontent-length: 0", b"content-length: 0\r\ncontent-length: {n}",
    b"content-length: {n}, 0", b"content-length: +{n}", b"content-length: -{n}", b"content-length: {n}.0",
    b"content-length: 0x{n}", b"content-length: \x0b{n}", b"content-length: 18446744073709551616",
    b"content-length: 9999999", b"content-length: {n}0", b"transfer-encoding: chunked",
    b"transfer-encoding: gzip, chunked", b"transfer-encoding: chunked, chunked", b"transfer-encoding: CHUNKED",
]  # fmt: skip
CHUNKED = [
    b"0\r\n\r\n", b"2\r\n{}\r\n0\r\n\r\n", b'2;a="b"\r\n{}\r\n0\r\nx-platform-key: b\r\n\r\n', b"2\n{}\n0\n\n",
    b"02\r\n{}\r\n00\r\n\r\n", b"2\r\n{}0\r\n\r\n", b"-2\r\n{}\r\n0\r\n\r\n", b"0x2\r\n{}\r\n0\r\n\r\n",
    b"ffffffffffffffff1\r\n{}\r\n0\r\n\r\n", b"2 \r\n{}\r\n0\r\n\r\n", b"2" + b";" * 20_000 + b"\r\n{}\r\n0\r\n\r\n",
    b"0\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"zz\r\n", b"5\r\n{}", b"",
]  # fmt: skip
