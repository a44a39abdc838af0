"""Envoy that answers by itself, the same bytes to everything: the limit of any gateway made of it."""

import json

# The least that makes Envoy serve HTTP; nothing of the gateway's own filters.
_CONFIG = """\
static_resources:
  listeners:
  - name: direct
    address: {{socket_address: {{address: "{host}", port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: direct
          codec_type: AUTO
          route_config:
            virtual_hosts:
            - name: direct
              domains: ["*"]
              routes:
              - match: {{prefix: /}}
                direct_response: {{status: 200, body: {{inline_string: {body}}}}}
                response_headers_to_add: [{{header: {{key: content-type, value: application/json}}}}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
"""


def config(address: str, body: str) -> str:
    """Envoy's configuration, as YAML.

    Args:
        address: `ip:port` to listen on.
        body: of every answer.
    """
    host, port = address.split(":")
    return _CONFIG.format(host=host, port=port, body=json.dumps(body))
