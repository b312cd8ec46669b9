# SPDX-License-Identifier: Apache-2.0
"""Runs in vLLM's worker process: the hooks, and the attention of a layer."""
