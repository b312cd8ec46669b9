# SPDX-License-Identifier: Apache-2.0
"""What kvserve adds to vLLM's HTTP server: routes, middleware and a page."""
