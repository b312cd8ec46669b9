# SPDX-License-Identifier: Apache-2.0
"""Runs in the API server's process: what kvserve adds to vLLM's HTTP server."""
