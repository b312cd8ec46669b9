# SPDX-License-Identifier: Apache-2.0
"""Load on a running server: workloads, vLLM's client, and what the server says."""
